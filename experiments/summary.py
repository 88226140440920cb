"""The table of experiments/README.md from the results: python -m experiments.summary [DIR]

With DIR, the workdir of finished experiments, their NAME.json and NAME.png come to experiments/results first.
"""

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from experiments import study

HERE = Path(__file__).parent
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
SEEDS = 3
HEADER = ("claim", "the paper", "here", "verdict", "command", "picture")


def collect(workdir: Path, results: Path = HERE / "results") -> list[str]:
    """Copies what finished experiments left in a folder, and names them; quick runs prove nothing and stay there.

    Raises:
      ValueError: an experiment with less than three seeds, or with a part of its claims.
    """
    names = []
    for name in study.NAMES:
        path = workdir / f"{name}.json"
        if path.exists() and (document := json.loads(path.read_text()))["budget"] != "quick":
            claims = importlib.import_module(f"experiments.{name}").CLAIMS
            if document["seeds"] < SEEDS or {claim.key for claim in claims} - set(document["findings"]):
                raise ValueError(f"{path}: expected {SEEDS} seeds or more and all claims; run it again without --only")
            (results / f"{name}.json").write_text(json.dumps(_small(document), indent=1) + "\n")
            shutil.copy(workdir / f"{name}.png", results / f"{name}.png")
            names.append(name)
    return names


def _small(value: Any) -> Any:
    """Without what only the machine that ran it can use, and with four digits."""
    if isinstance(value, dict):
        return {k: _small(v) for k, v in value.items() if k not in ("folder", "kernels", "picture")}
    if isinstance(value, list):
        return [_small(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(results: Path = HERE / "results") -> str:
    """A row a claim, with what the results say of it, or that it was not run yet; and below, what the runs were."""
    rows, notes, pictures = [], [], []
    for name in study.NAMES:
        module = importlib.import_module(f"experiments.{name}")
        path = results / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else None
        command = f"`python -m experiments.{name} --workdir DIR`"
        if found:
            command = command[:-1] + f" --budget={found['budget']} --seeds={found['seeds']}`"
            notes.append(
                f"- `{name}`: {found['budget']} budget ({found['of_budget']}), {found['seeds']} seeds, "
                f"{found['device']}, {found['seconds'] / 60:.0f} min, {found['date']}"
            )
        for claim in module.CLAIMS:
            finding = found["findings"].get(claim.key) if found else None
            ours, verdict = (finding["ours"], finding["verdict"]) if finding else ("not run yet", "")
            picture = f"[{name}.png](results/{name}.png)" if finding else ""
            rows.append((claim.text, claim.paper, ours, verdict, command, picture))
        if found:
            pictures.append(f"![{module.__doc__.split(':')[0]}](results/{name}.png)")
    parts = [study.markdown(HEADER, rows), "\n".join(notes or ["No experiment was run yet."]), *pictures]
    return "\n\n".join(parts)


def main() -> None:
    readme = HERE / "README.md"
    if len(sys.argv) > 2:
        sys.exit("Error: expected one folder: python -m experiments.summary [DIR]")
    if len(sys.argv) == 2:
        try:
            names = collect(Path(sys.argv[1]))
        except ValueError as error:
            sys.exit(f"Error: {error}")
        if not names:
            known = ", ".join(study.NAMES)
            sys.exit(f"Error: {sys.argv[1]} holds no result of {known}, or quick ones alone")
        print(f"Copied {', '.join(names)}")
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
