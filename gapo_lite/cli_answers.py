"""`gapo-lite generate` and `gapo-lite judge`: answers, and which of them are better."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gapo_lite.cli_app import MaxTokens, RunOrModel, RunsDir, Seed, TopP, app
from gapo_lite.errors import ConfigError, DataError
from gapo_lite.outputs import check_out, whole_file
from gapo_lite.terminal import note

if TYPE_CHECKING:
    from gapo_lite.answering import Sampling, Speaker
    from gapo_lite.answers import Answered
    from gapo_lite.chat import Voice
    from gapo_lite.journal import Journal
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
    split: Annotated[str, typer.Option(help="Split of a Hub id or datasets folder.")] = "train",
    kind: Annotated[
        AnswerFormat, typer.Option("--format", help="Who is to read the file.")
    ] = "answers",
    base: Annotated[
        bool, typer.Option("--base", help="Of a run, its base model's answers alone.")
    ] = False,
    model_id: Annotated[
        str | None,
        typer.Option(help="The model's name in the file; else the run's, or the file's."),
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
    from gapo_lite.answers import FORMATS, check_prompts, temperature_of
    from gapo_lite.prompts import load_prompts, text_prompt

    questions = [text_prompt(text) for text in prompt or []]
    questions += load_prompts(prompts, split) if prompts else []
    if not questions:
        raise ConfigError("there is nothing to answer: give --prompt TEXT or --prompts FILE.")
    check_out(out, prompts or "")
    check_prompts(kind, questions)
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
            part.write_text(FORMATS[kind](questions, answers, name), encoding="utf-8")
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
    """Tells how many prompts have no answer; none at all is an error."""
    said = next(iter(answers.values()))
    problems = [answered.problem for answered in said if answered.problem]
    if len(problems) == len(said):
        raise DataError(f"no prompt could be answered; the first: {problems[0]}")
    if problems:
        note(f"warning: {len(problems)} of {len(said)} prompts have no answer (see above).")
    short = sum(turn.cut_short for answered in said for turn in answered.turns)
    if short:
        note(f"{short} of {len(said)} answers were ended by --max-tokens, not by the model.")


def _model_name(voice: Voice, kind: str, base: bool, out: Path) -> str:
    if kind in ("mt_bench", "arena_hard"):
        return out.stem  # both benchmarks know a model by its file's name
    return f"{Path(voice.name).name}-base" if base else Path(voice.name).name
