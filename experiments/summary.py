"""Write the table of experiments/README.md from experiments/results: python -m experiments.summary [DIR]"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from alexnet_jax import tables
from alexnet_jax.errors import UserError, errors_on_one_line
from alexnet_jax.runtime.files import replaced
from experiments import (
    ablations,
    claims,
    depth,
    dropout_time,
    filters,
    lrn_four_layers,
    overfitting,
    relu_vs_tanh,
    remarks,
    retrieval,
    tower_time,
    variants,
)
from experiments.command import write_text
from experiments.study import repeats

MODULES = (
    relu_vs_tanh, ablations, lrn_four_layers, depth, overfitting, dropout_time, remarks, filters, retrieval, tower_time,
    variants,
)  # fmt: skip
EXPERIMENTS = {module.__name__.split(".")[-1]: module for module in MODULES}
HERE = Path(__file__).parent
RESULTS = HERE / "results"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def collect(workdir: Path, results: Path = RESULTS) -> list[str]:
    """Copy the results of finished experiments, and return their names; quick ones are not copied.

    Raises:
      UserError: an experiment with fewer seeds than it needs, or with some of its claims only.
    """
    names = []
    for name, module in EXPERIMENTS.items():
        path = workdir / f"{name}.json"
        if path.exists() and (document := json.loads(path.read_text()))["budget"] != "quick":
            found = module.judge(document["records"]) if document["seeds"] >= module.SEEDS else {}
            if {claim.key for claim in module.CLAIMS} - set(found):
                raise UserError(
                    f"{path}: expected {module.SEEDS} seeds or more and all claims; run it again without --only"
                )
            write_text(results / f"{name}.json", json.dumps(_small(document), indent=1) + "\n")
            with replaced(results / f"{name}.png") as temporary:
                shutil.copy(workdir / f"{name}.png", temporary)
            names.append(name)
    return names


def _small(value: Any) -> Any:
    """Return a value without paths and arrays, and with five digits."""
    if isinstance(value, dict):
        return {k: _small(v) for k, v in value.items() if k not in ("folder", "kernels", "picture")}
    if isinstance(value, list):
        return [_small(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def table(results: Path = RESULTS) -> str:
    """Return a row for each claim with its result, or that it has none yet, then the commands and the pictures.

    The claims are judged here, together: Holm's correction depends on their number.
    """
    pairs, experiments, notes, pictures = [], [], [], []
    for name, module in EXPERIMENTS.items():
        path = results / f"{name}.json"
        document = json.loads(path.read_text()) if path.exists() else None
        findings = module.judge(document["records"]) if document else {}
        pairs += [(claim, findings.get(claim.key)) for claim in module.CLAIMS]
        experiments += [f"[{name}](results/{name}.png)" if document else f"`{name}`"] * len(module.CLAIMS)
        if document:
            notes.append(
                f"- `python -m experiments.{name} --workdir DIR --budget={document['budget']} "
                f"--seeds={document['seeds']}`: {document['budget']} budget ({document['of_budget']}), "
                f"{document['seeds']} {repeats(module)}, {document['device']}, JAX {document['jax']}, "
                f"commit {document['commit']}, {document['seconds'] / 60:.0f} min, {document['date']}"
            )
            title = module.__doc__.split(":")[0]
            pictures.append(f"![{title}](results/{name}.png)\n\n**{title}.** {module.CAPTION}")
    rows = [(*row, experiment) for row, experiment in zip(claims.rows(pairs), experiments, strict=True)]
    header = (*claims.HEADER, "experiment")
    parts = [tables.table(rows, header, markdown=True), "\n".join(notes or ["No experiment was run yet."]), *pictures]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.summary", description=__doc__.split(":")[0] + ".")
    parser.add_argument(
        "workdir", metavar="DIR", type=Path, nargs="?",
        help="the working directory of finished experiments, whose NAME.json and NAME.png are copied to "
        "experiments/results first",
    )  # fmt: skip
    flags = parser.parse_args()
    with errors_on_one_line():
        if flags.workdir:
            names = collect(flags.workdir)
            if not names:
                raise UserError(f"{flags.workdir} holds no result of {', '.join(EXPERIMENTS)}, or only quick ones")
            print(f"Copied {', '.join(names)}")
        readme = HERE / "README.md"
        before, rest = readme.read_text().split(BEGIN)
        write_text(readme, f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")
    print(f"Written to {readme}")


if __name__ == "__main__":
    main()
