"""Evaluation factors: seconds and numbers beside rouge-score and bert-score, in one process.

    .venv/bin/python benchmarks/ef_scoring.py [--json FILE]

Takes the real pairs beside the checkout (../shared/data), else the shipped ones. Each time of ours
is the median of five calls of `score_pairs`; the other packages are slow enough to be called once.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from gapo_lite.ef import score_pairs
from gapo_lite.ef.lexical import LEXICAL, lexical_scores
from gapo_lite.ef.semantic import LAYERS, bert_scores
from gapo_lite.embedded import EMBEDDED_DATA, embedded_data_path, embedded_path

ROOT = Path(__file__).resolve().parents[1]
REAL = sorted((ROOT.parent / "shared" / "data").glob("alpaca_pairs_*.jsonl.gz"))
MINILM = "embedded:all-minilm-l6-v2"
Texts = list[str]


def main() -> None:
    arguments = parse_arguments()
    source, chosen, rejected = read_pairs()
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "source": source,
        "pairs": len(chosen),
        "characters_a_pair": [round(sum(map(len, s)) / len(s)) for s in (chosen, rejected)],
    }
    print(*(f"{key}: {value}" for key, value in result.items()), sep="\n")
    result["lexical"] = [
        compare_lexical(ef, chosen, rejected, use_stemmer)
        for use_stemmer in (False, True)
        for ef in ("rougeL", "rouge1", "rouge2", "jaccard")
    ]
    result["many"] = time_many(chosen, rejected, arguments.pairs)
    result["bertscore"] = compare_bertscore(chosen, rejected, 256)
    result["bertscore_memory"] = [bertscore_memory(count) for count in (1_000, 10_000, 50_000)]
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    parser.add_argument("--pairs", type=int, default=60_000, help="pairs of the large set (60000)")
    return parser.parse_args()


def read_pairs() -> tuple[str, Texts, Texts]:
    if REAL:
        lines = [line for path in REAL for line in gzip.decompress(path.read_bytes()).splitlines()]
        source = "real pairs: " + ", ".join(path.name for path in REAL)
    else:
        shipped = map(embedded_data_path, EMBEDDED_DATA)
        lines = [line for path in shipped for line in path.read_bytes().splitlines()]
        source = "shipped pairs: " + ", ".join(EMBEDDED_DATA)
    rows = [json.loads(line) for line in lines]
    return source, [row["chosen"] for row in rows], [row["rejected"] for row in rows]


def compare_lexical(ef: str, chosen: Texts, rejected: Texts, use_stemmer: bool) -> dict[str, Any]:
    theirs, expected = timed(lambda: reference(ef, chosen, rejected, use_stemmer))
    runs = [
        timed(lambda: score_pairs(chosen, rejected, ef, use_stemmer=use_stemmer)) for _ in range(5)
    ]
    ours = statistics.median(seconds for seconds, _ in runs)
    row = {
        "ef": ef,
        "use_stemmer": use_stemmer,
        "rouge_score_seconds": theirs,
        "seconds": ours,
        "ratio": theirs / ours,
        "equal_bits": all(np.array_equal(scores, expected) for _, scores in runs),
    }
    print(
        f"{ef:8} {'stemmed' if use_stemmer else '':8} rouge-score {theirs:7.2f} s   "
        f"ours {ours:6.3f} s   {row['ratio']:5.0f} times as fast   "
        f"equal to the last bit: {row['equal_bits']}"
    )
    return row


def reference(ef: str, chosen: Texts, rejected: Texts, use_stemmer: bool) -> np.ndarray:
    """rouge-score's F1; for Jaccard, which it lacks, the same of the sets of its tokens."""
    scorer = RougeScorer([] if ef == "jaccard" else [ef], use_stemmer=use_stemmer)
    if ef != "jaccard":
        pairs = zip(chosen, rejected, strict=True)
        return np.array([scorer.score(c, r)[ef].fmeasure for c, r in pairs])
    tokens = scorer._tokenizer.tokenize
    sets = [(set(tokens(c)), set(tokens(r))) for c, r in zip(chosen, rejected, strict=True)]
    return np.array([len(c & r) / max(len(c | r), 1) for c, r in sets])


def time_many(chosen: Texts, rejected: Texts, count: int) -> dict[str, Any]:
    """Seconds for `count` pairs that share no text: each real one is turned at a random place."""
    generator = random.Random(0)
    many = [[turned(generator, texts, i) for i in range(count)] for texts in (chosen, rejected)]
    characters = sum(len(text) for texts in many for text in texts) / count
    each = {ef: timed(lambda ef=ef: score_pairs(*many, ef))[0] for ef in LEXICAL}
    together = timed(lambda: lexical_scores(*many, list(LEXICAL)))[0]
    parts = ", ".join(f"{ef} {seconds:.1f} s" for ef, seconds in each.items())
    print(
        f"{count} pairs of {characters:.0f} characters: {parts}; "
        f"all four in one pass {together:.1f} s"
    )
    return {"pairs": count, "seconds": each, "all_in_one_pass_seconds": together}


def turned(generator: random.Random, texts: Texts, index: int) -> str:
    text = texts[index % len(texts)]
    place = generator.randrange(len(text) + 1)
    return f"{text[place:]} {index} {text[:place]}"


def compare_bertscore(
    chosen: Texts, rejected: Texts, count: int, rounds: int = 3
) -> dict[str, Any]:
    """Both packages in turn, `rounds` times, on as many real pairs; the ratio is the median's."""
    import bert_score

    picked = random.Random(0).sample(range(len(chosen)), count)
    chosen, rejected = [chosen[i] for i in picked], [rejected[i] for i in picked]
    folder, layer = str(embedded_path(MINILM)), LAYERS[MINILM]
    times = []
    for _ in range(rounds):
        ours, scores = timed(lambda: bert_scores(chosen, rejected, model=MINILM))
        theirs, expected = timed(
            lambda: bert_score.score(rejected, chosen, model_type=folder, num_layers=layer)
        )
        times.append((theirs / ours, theirs, ours))
    ratio, theirs, ours = sorted(times)[rounds // 2]
    difference = max(
        float(np.abs(scores[:, i] - part.double().numpy()).max()) for i, part in enumerate(expected)
    )
    print(
        f"bertscore on {count} pairs, {MINILM}: bert-score {theirs:.1f} s, ours {ours:.1f} s, "
        f"{ratio:.2f} times (rounds: {', '.join(f'{each:.2f}' for each, *_ in times)}), "
        f"largest difference of P, R or F1 {difference:.1e}"
    )
    return {
        "pairs": count,
        "bert_score_seconds": theirs,
        "seconds": ours,
        "ratio": ratio,
        "ratios": [each for each, *_ in times],
        "largest_difference": difference,
    }


def bertscore_memory(count: int) -> dict[str, Any]:
    """Peak memory of a process that scores so many short pairs, no two texts alike."""
    program = (
        "import sys; from gapo_lite.ef.semantic import bert_scores; "
        "from gapo_lite.memory import peak_memory_gib; "
        "texts = [[f'{side} {i} of {i % 97}' for i in range(int(sys.argv[1]))] for side in 'ab']; "
        f"bert_scores(*texts, model={MINILM!r}); "
        "print(peak_memory_gib())"
    )
    command = [sys.executable, "-c", program, str(count)]
    seconds, done = timed(lambda: subprocess.run(command, capture_output=True, check=True))
    found = {"pairs": count, "seconds": seconds, "peak_gib": round(float(done.stdout), 3)}
    print(f"bertscore of {count:,} short pairs: {seconds:.0f} s, peak {found['peak_gib']} GiB")
    return found


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


if __name__ == "__main__":
    main()
