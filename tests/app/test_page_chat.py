"""The Runs and Chat tabs in a real browser, over runs that were really trained."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from browsing import (
    HOSTILE,
    choose,
    curves,
    enter,
    expect,
    expect_notice,
    expect_state,
    of_title,
    open_tab,
    shoot,
    small_config,
    visiting,
    watch,
)
from playwright.sync_api import TimeoutError as TooLate
from transformers import AutoModelForCausalLM, AutoTokenizer

from gapo_lite.training import train


@pytest.fixture(scope="module", autouse=True)
def trained(server: Any, tiny_settings: dict[str, Any]) -> None:
    """Two runs, trained where the page looks but not by it."""
    for name, objective in (("first", "gapo"), ("second", "simpo")):
        config = small_config(server, tiny_settings, f"objective.name={objective}")
        train(config, runs_dir=server.runs_dir, name=name, show_progress=False)


@pytest.fixture
def page(chromium: Any, server: Any) -> Iterator[Any]:
    with visiting(chromium, server) as opened:
        yield opened


@pytest.fixture
def chat(page: Any) -> Any:
    """The Chat tab with the first run and short answers."""
    panel = open_chat(page)
    panel.get_by_role("button", name="How answers are drawn").click()
    expect(panel.get_by_label("max tokens", exact=True)).to_have_value("256")
    enter(panel, "max tokens", 12)
    return panel


def open_chat(page: Any) -> Any:
    """The Chat tab with the first run, not the newest, which the page chooses."""
    panel = open_tab(page, "Chat")
    expect(panel.get_by_label("who answers")).to_have_value("second")
    choose(panel, "who answers", "first")
    return panel


@pytest.fixture
def copy_of(server: Any) -> Iterator[Callable[[str], Path]]:
    """Copies the first run's folder under another name; what is left of it goes afterwards."""
    copies: list[Path] = []

    def copied(name: str) -> Path:
        copies.append(Path(shutil.copytree(server.runs_dir / "first", server.runs_dir / name)))
        return copies[-1]

    yield copied
    for path in copies:
        shutil.rmtree(path, ignore_errors=True)


def in_table(panel: Any, text: str) -> Any:
    """A cell of the table of runs that says just this."""
    return panel.get_by_role("gridcell").get_by_text(text, exact=True).filter(visible=True)


def overlay(panel: Any, *names: str) -> None:
    """Draws runs into the same figures."""
    field = panel.get_by_label("overlay")
    for name in names:
        field.click()
        panel.page.get_by_role("option", name=name, exact=True).click()
        expect(of_title(panel, "Loss")).to_contain_text(name)
    field.press("Tab")
    expect(panel.page.get_by_role("option")).to_have_count(0)


# -- runs --


def test_runs_that_the_page_did_not_start_are_listed_overlaid_and_compared(
    page: Any, server: Any
) -> None:
    panel = open_tab(page, "Runs")
    for name, objective in (("first", "gapo"), ("second", "simpo")):
        row = panel.get_by_role("row").filter(has=page.get_by_text(name, exact=True)).first
        expect(row).to_contain_text("finished")
        expect(row).to_contain_text(objective)
        expect(row).to_contain_text("12 of 12")
    overlay(panel, "first", "second")
    panel.get_by_label("number input for smoothing").fill("0")
    panel.get_by_label("number input for smoothing").press("Enter")
    panel.get_by_label("epoch", exact=True).click()
    expect(of_title(panel, "Loss").locator("text.label")).to_have_text("epoch")
    drawn = curves(panel, "Loss")
    for name in ("first", "second"):
        rows = [row for row in server.metrics(name) if "loss" in row]
        assert drawn[name][0] == pytest.approx([row["epoch"] for row in rows])
    shoot(page, "runs-overlaid")

    panel.get_by_role("button", name="Difference of two configurations").click()
    choose(panel, "one run", "first")
    choose(panel, "another", "second")
    expect(panel.get_by_role("row", name="objective.name gapo simpo")).to_be_visible()


def test_an_adapter_is_downloaded_with_its_model_card(page: Any) -> None:
    panel = open_tab(page, "Runs")
    choose(panel, "chosen run", "first")
    with page.expect_download(timeout=90_000) as saving:
        panel.get_by_role("button", name="Download adapter").click()
    assert saving.value.suggested_filename == "first-adapter.zip"
    with zipfile.ZipFile(saving.value.path()) as archive:
        assert archive.testzip() is None
        names = {Path(name).name for name in archive.namelist()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "README.md"}


def test_the_merged_model_is_exported(page: Any, server: Any) -> None:
    panel = open_tab(page, "Runs")
    choose(panel, "chosen run", "first")
    panel.get_by_role("button", name="Export merged").click()
    expect(panel).to_contain_text("The merged model is in", timeout=90_000)
    merged = server.folder / "exports" / "first-merged"
    AutoModelForCausalLM.from_pretrained(merged)
    assert (merged / "README.md").is_file()


def test_base_and_tuned_are_compared_on_the_heldout_pairs(page: Any, server: Any) -> None:
    panel = open_tab(page, "Runs")
    choose(panel, "chosen run", "second")
    panel.get_by_role("button", name="Compare with base").click()
    row = panel.get_by_role("row").filter(has_text=re.compile("^reward margin"))
    expect(row).to_be_visible(timeout=90_000)
    found = json.loads((server.runs_dir / "second" / "comparison.json").read_text())
    for side in ("base", "tuned"):
        expect(row).to_contain_text(f"{found[side]['rewards/margins']:.3f}")
    choose(panel, "chosen run", "first")
    expect(row).to_be_hidden()


def test_a_run_that_began_after_the_page_was_opened_is_watched(
    page: Any, copy_of: Callable[[str], Path]
) -> None:
    open_tab(page, "Train")
    copy_of("late")
    panel = open_tab(page, "Runs")
    expect(in_table(panel, "late")).to_be_visible()
    choose(panel, "chosen run", "late")
    panel.get_by_role("button", name="Watch").click()
    expect(page.get_by_role("tab", name="Train", selected=True)).to_be_visible()
    form = page.get_by_role("tabpanel").filter(visible=True)
    expect(form.get_by_label("run", exact=True)).to_have_value("late")
    expect_state(page, "finished")


def test_a_run_is_copied_to_a_new_form(page: Any, server: Any) -> None:
    panel = open_tab(page, "Runs")
    choose(panel, "chosen run", "second")
    panel.get_by_role("button", name="Copy to a new form").click()
    expect(page.get_by_role("tab", name="Train", selected=True)).to_be_visible()
    form = page.get_by_role("tabpanel").filter(visible=True)
    expect(form.get_by_label("objective", exact=True)).to_have_value("simpo")
    expect(form.get_by_label("learning rate", exact=True)).to_have_value("0.01")


def test_a_run_is_renamed_and_deleted_after_asking(
    page: Any, server: Any, copy_of: Callable[[str], Path]
) -> None:
    copy_of("spare")
    panel = open_tab(page, "Runs")
    expect(in_table(panel, "spare")).to_be_visible()
    choose(panel, "chosen run", "spare")
    for name, words in (("../first", "cannot be a run's name"), ("first", "is in use")):
        enter(panel, "new name", name)
        panel.get_by_role("button", name="Rename").click()
        expect_notice(page, words)
    assert (server.runs_dir / "spare" / "config.yaml").is_file()
    enter(panel, "new name", "renamed")
    panel.get_by_role("button", name="Rename").click()
    expect_notice(page, "spare is now renamed.")
    expect(in_table(panel, "renamed")).to_be_visible()
    assert not (server.runs_dir / "spare").exists()

    panel.get_by_role("button", name="Delete", exact=True).click()
    expect(panel.get_by_text("Delete renamed (finished)")).to_be_visible()
    panel.get_by_role("button", name="Keep it").click()
    expect(panel.get_by_role("button", name="Delete it")).to_be_hidden()
    assert (server.runs_dir / "renamed").is_dir()
    panel.get_by_role("button", name="Delete", exact=True).click()
    panel.get_by_role("button", name="Delete it").click()
    expect_notice(page, "renamed was deleted.")
    expect(in_table(panel, "renamed")).to_have_count(0)
    assert not (server.runs_dir / "renamed").exists()


def test_what_a_run_has_written_is_shown_as_it_is_and_never_becomes_an_element(
    page: Any, copy_of: Callable[[str], Path]
) -> None:
    run = copy_of("hostile")
    answers = [
        {
            "step": step,
            "prompt": HOSTILE.format("prompt"),
            "answer": HOSTILE.format(f"answer{step}"),
        }
        for step in (0, 12)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    (run / "train.log").write_text(f"{HOSTILE.format('log')}\n</pre><script>hacked=1</script>\n")
    status = json.loads((run / "status.json").read_text())
    status |= {"state": "failed", "message": HOSTILE.format("message")}
    (run / "status.json").write_text(json.dumps(status))
    config = (run / "config.yaml").read_text(encoding="utf-8")
    source = re.search(r"  source: (.*)", config)
    assert source is not None
    hostile_source = f"{source[1].strip()}{HOSTILE.format('source')}"
    (run / "config.yaml").write_text(config.replace(source[1], json.dumps(hostile_source)))
    panel = watch(page, "hostile")
    expect_state(page, "failed")
    for place in ("prompt", "answer0", "answer12", "log", "message"):
        expect(panel.locator(".live")).to_contain_text(HOSTILE.format(place))
    panel = open_tab(page, "Runs")
    expect(in_table(panel, f"{HOSTILE.format('source').rpartition('/')[2]}")).to_be_visible()
    panel.get_by_role("button", name="Difference of two configurations").click()
    choose(panel, "one run", "first")
    choose(panel, "another", "hostile")
    expect(panel.get_by_role("row", name="data.source")).to_contain_text(HOSTILE.format("source"))


# -- chat --


def ask(panel: Any, question: str) -> None:
    """Sends a question. The page takes none while it closes the answer before: tried again then."""
    field = panel.get_by_placeholder("Ask something")
    field.fill(question)
    for _ in range(4):
        field.press("Enter")
        with suppress(AssertionError):
            return expect(field).to_have_value("", timeout=5000)
    raise AssertionError("the question was not taken")


def answered_again(panel: Any, seed: int) -> list[str]:
    """What is said after Regenerate with a seed; tried again as in `ask`."""
    enter(panel, "seed", seed)
    before = panel.locator(".talks").inner_html()  # the pace, at least, is another one afterwards
    for _ in range(4):
        panel.get_by_role("button", name="Regenerate").click()
        with suppress(TooLate):
            changed = f"document.querySelector('.talks').outerHTML.includes({json.dumps(before)})"
            panel.page.wait_for_function(f"!{changed}", timeout=5000)
            return answers(panel, 1)
    raise AssertionError("it was not answered again")


def answers(panel: Any, expected: int) -> list[str]:
    """What the model said, once that many answers are complete."""
    expect(panel.get_by_text(re.compile(r"\d+ tokens, .* a second"))).to_have_count(expected)
    return panel.locator(".turn.model .said").all_inner_texts()


def without_adapter(model: Path, question: str) -> str:
    """The likeliest answer of 12 tokens, by transformers alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = base.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer: str = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()


def test_base_and_tuned_answer_and_base_is_the_model_without_the_adapter(
    chat: Any, tiny_model: Path
) -> None:
    ask(chat, "Why is the sky blue?")
    (alone,) = answers(chat, 1)
    chat.get_by_label("Side by side").click()
    ask(chat, "Why is the sky blue?")
    expect(chat.get_by_role("heading", name="first, base model")).to_be_visible()
    base, tuned = answers(chat, 2)
    assert tuned == alone
    assert base.strip() == without_adapter(tiny_model, "Why is the sky blue?") != tuned.strip()
    shoot(chat.page, "chat-side-by-side")

    chat.get_by_label("One voice").click()
    choose(chat, "who answers", f"base: {tiny_model}")
    ask(chat, "Why is the sky blue?")
    expect(chat.get_by_role("heading", name=str(tiny_model))).to_be_visible()
    assert len(answers(chat, 1)) == 1


def test_a_conversation_goes_on_is_answered_again_and_begins_anew(chat: Any) -> None:
    enter(chat, "number input for temperature", 1)
    enter(chat, "seed", 5)
    ask(chat, HOSTILE.format("question"))
    first = answers(chat, 1)
    expect(chat.locator(".turn.you .said")).to_have_text(HOSTILE.format("question"))
    ask(chat, "And then?\nOn two lines.")
    expect(chat.locator(".turn.you")).to_have_count(2)
    both = answers(chat, 1)
    assert both[:1] == first
    assert answered_again(chat, 6) != both
    assert answered_again(chat, 5) == both  # same seed, same draws
    chat.get_by_role("button", name="New conversation").click()
    expect(chat.locator(".turn")).to_have_count(0)
    chat.get_by_role("button", name="Send").click()
    expect_notice(chat.page, "The question is empty: write one.")


def test_an_answer_can_be_stopped_and_another_question_asked(chat: Any) -> None:
    enter(chat, "max tokens", 1900)
    chat.get_by_label("Side by side").click()
    ask(chat, "Why?")
    expect(chat.locator(".turn.model")).to_have_count(1)
    chat.get_by_role("button", name="Stop", exact=True).click()
    expect(chat.get_by_text("Stopped.").first).to_be_visible()
    enter(chat, "max tokens", 12)
    ask(chat, "And now?")
    assert len(answers(chat, 2)) == 2
    assert chat.locator(".turn.you .said").all_inner_texts() == ["And now?"] * 2


def test_a_blind_answer_that_is_stopped_shows_neither_side_and_asks_for_no_vote(chat: Any) -> None:
    enter(chat, "max tokens", 1900)
    chat.get_by_label("Blind").click()
    ask(chat, "Why?")
    expect(chat.get_by_text("both answers are being written …")).to_be_visible()
    chat.get_by_role("button", name="Stop", exact=True).click()
    expect(chat.get_by_text("Stopped, so there is nothing to vote on.")).to_have_count(2)
    expect(chat.locator(".turn.model")).to_have_count(0)
    expect(chat.get_by_role("button", name="Tie")).to_be_hidden()


def test_a_question_sent_right_after_choosing_blind_always_gets_its_vote(
    chat: Any, server: Any
) -> None:
    votes = server.runs_dir / "first" / "votes.jsonl"
    votes.unlink(missing_ok=True)
    for number, button in enumerate(("Left is better", "Right is better", "Both bad"), start=1):
        chat.get_by_label("Side by side").click()
        chat.get_by_placeholder("Ask something").fill("Who are you?")
        chat.get_by_label("Blind").click()
        chat.get_by_placeholder("Ask something").press("Enter")
        expect(chat.get_by_role("button", name=button)).to_be_visible()
        titles = [heading.inner_text() for heading in chat.locator(".talk h4").all()]
        assert titles == ["Left", "Right"]
        assert not chat.get_by_text("a second").count()  # the pace could tell who it is
        if number == 1:
            shoot(chat.page, "chat-blind")
        chat.get_by_role("button", name=button).click()
        expect(chat.get_by_text(re.compile(f"{number} votes?: .*too few to say"))).to_be_visible()
        expect(chat.get_by_role("heading", name="first, tuned")).to_be_visible()
        expect(chat.get_by_role("button", name=button)).to_be_hidden()
    kept = [json.loads(line) for line in votes.read_text(encoding="utf-8").splitlines()]
    assert len(kept) == 3
    assert [vote["winner"] for vote in kept][2] == "both_bad"
    assert {vote["winner"] for vote in kept[:2]} <= {"base", "tuned"}


def test_a_comparison_without_a_run_is_refused_in_a_sentence(chat: Any, tiny_model: Path) -> None:
    choose(chat, "who answers", f"base: {tiny_model}")
    chat.get_by_label("Blind").click()
    chat.get_by_placeholder("Ask something").fill("Why?")
    chat.get_by_role("button", name="Send").click()
    expect_notice(chat.page, "A comparison needs a run")
    expect(chat.get_by_placeholder("Ask something")).to_have_value("Why?")


def test_runs_and_chat_fit_a_phone(chromium: Any, server: Any) -> None:
    with visiting(chromium, server, theme="dark", width=390) as page:
        panel = watch(page, "first")
        expect(of_title(panel, "Loss")).to_be_visible()
        shoot(page, "phone-run")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        panel = open_tab(page, "Runs")
        overlay(panel, "first", "second")
        shoot(page, "phone-overlaid")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        panel = open_chat(page)
        panel.get_by_label("Side by side").click()
        ask(panel, "Word" * 200)
        expect(panel.get_by_text("a second")).to_have_count(2)
        for column in panel.locator(".talk").all():  # at the end of what does not fit
            column.scroll_into_view_if_needed()
            expect(column.get_by_text("a second")).to_be_in_viewport()
        shoot(page, "phone-side-by-side")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_long_answer_is_followed_unless_the_person_reads_further_up(chat: Any) -> None:
    enter(chat, "max tokens", 600)
    chat.page.evaluate(  # in the browser, which sees every piece: scrolls up in the middle
        """() => new MutationObserver(() => {
            const turns = document.querySelector(".turns");
            const said = document.querySelector(".turn.model .said");
            if (window.below !== undefined || !said || said.textContent.length < 1000) return;
            window.below = turns.scrollHeight - turns.clientHeight - turns.scrollTop;
            turns.scrollTop = 40;
            turns.dispatchEvent(new Event("scroll"));  // else a busy browser tells of it too late
        }).observe(document.body, { subtree: true, childList: true, characterData: true })"""
    )
    ask(chat, "Line\n" * 60)
    answers(chat, 1)
    assert chat.page.evaluate("window.below") < 8
    assert chat.locator(".turns").evaluate("(one) => one.scrollTop") == 40
    enter(chat, "max tokens", 12)
    ask(chat, "And now?")
    expect(chat.locator(".turn.model")).to_have_count(2)
    expect(chat.get_by_text("a second")).to_be_in_viewport()
