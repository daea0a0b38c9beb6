"""`gapo-lite generate` and `gapo-lite judge`: answers, and which of them are better."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gapo_lite.cli_app import (
    IntervalSeed,
    MaxTokens,
    RunOrModel,
    RunsDir,
    Seed,
    Split,
    TopP,
    app,
)
from gapo_lite.errors import ConfigError, DataError
from gapo_lite.outputs import check_out, whole_file
from gapo_lite.terminal import note

if TYPE_CHECKING:
    from gapo_lite.answering import Sampling, Speaker
    from gapo_lite.answers import Answered
    from gapo_lite.chat import Voice
    from gapo_lite.endpoint import Endpoint
    from gapo_lite.journal import Journal
    from gapo_lite.judge import Verdict
    from gapo_lite.pairing import AnswerPair
    from gapo_lite.prompts import Prompt

AnswerFormat = Literal["answers", "alpaca_eval", "mt_bench", "arena_hard"]


@app.command()
def generate(
    name: RunOrModel,
    out: Annotated[Path, typer.Option(help="The file for the answers.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt. Repeatable.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|HUB_ID",
            help="A .txt (a prompt a line), .jsonl, .json, .csv or .parquet, with `prompt`, "
            "`instruction` or `turns`; a Hub id; or a file on the Hub, as owner/name/file.json.",
        ),
    ] = None,
    split: Split = "train",
    kind: Annotated[
        AnswerFormat, typer.Option("--format", help="Who is to read the file.")
    ] = "answers",
    base: Annotated[
        bool, typer.Option("--base", help="Of a run, its base model's answers alone.")
    ] = False,
    model_id: Annotated[
        str | None,
        typer.Option(help="The model's name in the file; default: the run's, or the file's."),
    ] = None,
    runs_dir: RunsDir = Path("runs"),
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=10,
            help="0 takes the likeliest token each time. Without it 0, for mt_bench FastChat's.",
        ),
    ] = None,
    top_p: TopP = 1.0,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 8,
) -> None:
    """Answer prompts: by base and tuned model for a run, else by the model. Resumable."""
    from gapo_lite.answers import FORMATS, check_prompts, num_left_out, temperature_of
    from gapo_lite.prompts import load_prompts, text_prompt

    questions = [text_prompt(text) for text in prompt or []]
    questions += load_prompts(prompts, split) if prompts else []
    if not questions:
        raise ConfigError("there is nothing to answer: give --prompt TEXT or --prompts FILE.")
    check_out(out, prompts or "")
    check_prompts(kind, questions)
    if num := num_left_out(kind, questions):
        note(
            f"warning: {num} of {len(questions)} prompts have a system prompt or earlier turns, "
            f"which the model reads and the format {kind} leaves out: a judge will not see them."
        )
    from gapo_lite.answering import Sampling, speaker
    from gapo_lite.chat import load_voice
    from gapo_lite.journal import open_journal

    temperatures = [
        temperature_of(kind, question) if temperature is None else temperature
        for question in questions
    ]
    sampling = Sampling(temperatures, top_p, max_tokens, seed)
    with open_journal(out) as journal:
        voice = load_voice(name, runs_dir)
        speakers = {
            side: speaker(voice, batch_size=batch_size, base=is_base)
            for side, is_base in _sides(voice, kind, base).items()
        }
        answers = {
            side: _answer(side, who, questions, sampling, journal) for side, who in speakers.items()
        }
        _check_some(answers)
        with whole_file(out) as part:
            name = model_id or _model_name(voice, kind, base, out)
            text = FORMATS[kind](questions, answers, name)
            # a row's id or data set may hold half of a character, for which this is JSON
            part.write_text(text, encoding="utf-8", errors="backslashreplace")
    typer.echo(f"{len(questions)} prompts answered, written to {out}")


def _sides(voice: Voice, kind: str, base: bool) -> dict[str, bool]:
    """Side → whether the adapter is left out."""
    if base and voice.tuned is None:
        raise ConfigError(f"{voice.name} is a base model itself: leave out --base.")
    if kind == "answers" and voice.tuned is not None and not base:
        return {"base": True, "tuned": False}
    return {"answer": base}


def _answer(
    side: str, who: Speaker, prompts: list[Prompt], sampling: Sampling, journal: Journal
) -> list[Answered]:
    from gapo_lite.answering import answer_prompts
    from gapo_lite.progress import counting_progress

    label = "answering" if side == "answer" else f"answering ({side})"
    with counting_progress(label, "answers") as progress:
        return answer_prompts(who, prompts, sampling, journal, progress)


def _check_some(answers: dict[str, list[Answered]]) -> None:
    """Tells how many prompts have no answer; none at all is an error. And how many answers were cut
    short, of each side."""
    for side, said in answers.items():
        problems = [answered.problem for answered in said if answered.problem]
        whose, num = "" if side == "answer" else f"{side}: ", len(said)
        if len(problems) == num:
            raise DataError(f"{whose}no prompt could be answered; the first: {problems[0]}")
        if problems:
            note(f"warning: {whose}{len(problems)} of {num} prompts have no answer (see above).")
        turns = [turn for answered in said if not answered.problem for turn in answered.turns]
        short = sum(turn.cut_short for turn in turns)
        if short:
            note(
                f"{whose}{short} of {len(turns)} answers were ended by --max-tokens, not by the "
                "model."
            )


def _model_name(voice: Voice, kind: str, base: bool, out: Path) -> str:
    if kind in ("mt_bench", "arena_hard"):
        return out.stem  # both benchmarks know a model by its file's name
    return f"{Path(voice.name).name}-base" if base else Path(voice.name).name


# -- judge --


@app.command()
def judge(
    a: Annotated[str, typer.Argument(metavar="A", help="Answers: FILE, or FILE:FIELD.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What they are compared with.")],
    out: Annotated[Path, typer.Option(help="A .json file for verdicts and summary.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The judge: a model behind $OPENAI_BASE_URL (default: OpenAI's own), with the key "
            "$OPENAI_API_KEY."
        ),
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option(help="The judge: a reward model's folder or Hub id.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE|HUB_ID", help="The question.jsonl of MT-Bench or Arena-Hard."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Send without asking.")] = False,
    price_in: Annotated[
        float | None, typer.Option(min=0, help="Price of a million tokens that are read.")
    ] = None,
    price_out: Annotated[
        float | None, typer.Option(min=0, help="Price of a million tokens that are written.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Requests at once.")] = 4,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=86400, help="Seconds for one request.")
    ] = 60.0,
    retries: Annotated[
        int, typer.Option(min=0, help="How often a failed request is sent again.")
    ] = 6,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 512,
    length_control: Annotated[
        Literal["logistic", "alpaca_eval"],
        typer.Option(help="alpaca_eval adds AlpacaEval's own, for its own prompts."),
    ] = "logistic",
    seed: IntervalSeed = 0,
) -> None:
    """Compare two files of answers: win rate and length, and what length explains. Resumable."""
    if (model is None) == (reward_model is None):
        raise ConfigError("say who judges: either --model NAME or --reward-model NAME.")
    from gapo_lite.journal import open_journal
    from gapo_lite.judgement import show_summary, summarize, verdict_rows
    from gapo_lite.pairing import check_two, pair_answers, read_answer_file, split_spec
    from gapo_lite.prompts import load_prompts
    from gapo_lite.win_rates import in_alpaca_eval_order

    for source in (split_spec(a)[0], split_spec(b)[0], prompts or ""):
        check_out(out, source)
    questions = load_prompts(prompts) if prompts else []
    first, second = (read_answer_file(spec, questions) for spec in (a, b))
    check_two(a, b, first, second)
    pairs, num_unpaired = pair_answers(first, second)
    if length_control == "alpaca_eval":
        pairs = in_alpaca_eval_order(pairs)
    with open_journal(out) as journal:  # of a reward model; and nobody else writes this file
        if model is not None:
            from gapo_lite.endpoint import Endpoint

            endpoint = Endpoint.from_environment(
                model, max_tokens=max_tokens, timeout=timeout, retries=retries
            )
            name = endpoint.name
            _agree_to_cost(endpoint, pairs, price_in, price_out, yes)
            verdicts = _ask(endpoint, pairs, workers)
        else:
            name = str(reward_model)
            verdicts = _score(name, pairs, journal)
        summary = summarize(
            first.name,
            second.name,
            name,
            pairs,
            verdicts,
            num_unpaired=num_unpaired,
            length_control=length_control,
            seed=seed,
        )
        rows = verdict_rows(pairs, verdicts)
        with whole_file(out) as part:
            text = json.dumps({"summary": summary, "verdicts": rows}, indent=1, ensure_ascii=False)
            # half of a character in an answer is JSON's too
            part.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    show_summary(summary)
    typer.echo(f"written to {out}")


def _agree_to_cost(
    endpoint: Endpoint,
    pairs: list[AnswerPair],
    price_in: float | None,
    price_out: float | None,
    yes: bool,
) -> None:
    from gapo_lite.judge import cost

    due = cost(endpoint, pairs)
    note(
        f"{endpoint.name}: {due.requests:,} requests for {len(pairs):,} pairs (each in both "
        f"orders; {due.kept:,} replies are kept from before), {due.most_requests:,} at most, since "
        "a reply that names no answer is asked for once more. These read about "
        f"{due.tokens_in:,} tokens and write at most {due.tokens_out:,}; requests that fail and "
        "are sent again come on top."
    )
    if price_in is not None or price_out is not None:
        price = due.price(price_in or 0.0, price_out or 0.0)
        note(f"At most {price:,.4f} at the given prices, as far as tokens can be estimated.")
    if not due.requests or yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("nothing was asked: agree to the cost with --yes.")
    if not typer.confirm("Go on?", err=True):
        raise typer.Exit(1)


def _ask(endpoint: Endpoint, pairs: list[AnswerPair], workers: int) -> list[Verdict]:
    from gapo_lite.judge import judge_pairs
    from gapo_lite.progress import counting_progress

    try:
        with counting_progress("judging", "pairs") as progress:
            return judge_pairs(endpoint, pairs, workers=workers, progress=progress)
    finally:
        spent, counted = endpoint.spent, ""
        if spent.tokens_in or spent.tokens_out:
            counted = (
                f"; the server counted {spent.tokens_in:,} tokens in and {spent.tokens_out:,} out"
            )
        if spent.requests:
            note(f"It took {spent.requests:,} requests{counted}.")


def _score(name: str, pairs: list[AnswerPair], journal: Journal) -> list[Verdict]:
    from gapo_lite.progress import counting_progress
    from gapo_lite.reward_model import load_reward_model, score_pairs_by

    reward = load_reward_model(name)
    with counting_progress("scoring", "pairs") as progress:
        return score_pairs_by(reward, pairs, journal, progress)
