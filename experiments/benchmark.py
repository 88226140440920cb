"""How fast it is, and how far from what the device could do: python -m experiments.benchmark --workdir DIR

Each part runs in a process of its own and is one entry of DIR/benchmark.json: the training step and inference beside
PyTorch (`step`), each layer beside the device's roofline (`layers`), what the operations written by hand gain over
XLA's (`forms`), the growth with image, batch and width (`growth`) and with devices (`devices`), what the loop of
`alexnet_jax.main` adds to the bare step with the data on the device (`loop`) and read from its files (`stream`), and
how soon it trains at the first and second start (`start`). A part that runs again replaces its entry.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import flags as absl_flags
from ml_collections import config_flags
from PIL import Image

from alexnet_jax import AlexNet, paper_sgd, sharding
from alexnet_jax.configs import fashion_mnist
from alexnet_jax.errors import UserError
from alexnet_jax.evaluation import jit_forward, predict
from alexnet_jax.flags import FLAG_ERRORS, flag_error
from alexnet_jax.ops import PLAIN, ops_for
from alexnet_jax.runtime.compilation_cache import use_compilation_cache
from alexnet_jax.runtime.files import write_json
from alexnet_jax.runtime.huge_pages import use_huge_pages
from alexnet_jax.setup import build_model, setup
from alexnet_jax.train import Interrupted, train_and_evaluate
from alexnet_jax.train_step import create_state, make_train_step
from experiments import benchmark_report, measure
from experiments.layers import forward_and_backward, layers_of, least_bytes, step_bytes
from experiments.peer import Peer, differences, network
from experiments.sharding import Layout
from experiments.sharding import measure as measure_layout

ROOT = Path(__file__).parents[1]
PARTS = ("step", "layers", "forms", "growth", "devices", "loop", "stream", "start")
BY_HAND = ("conv", "max_pool", "local_response_norm")  # the operations that differ from XLA's own
# By the largest element of an array. Where float32 took another pixel for a pooling window's maximum than float64, a
# gradient of conv1 changed by 0.003.
TOLERANCE = {"logits": 1e-5, "gradients": 1e-2}
# Of `main`'s default recipe a part of the data, which is read again in each round.
LOOP_DATA = ("train_split=train[:12800]", "validation_split=train[55000:56000]", "test_split=test[:1000]")
STREAM_RECIPE = ROOT / "alexnet_jax" / "configs" / "imagenet2012.py"
START_DATA = ("train_split=train[:1000]", "validation_split=train[55000:55500]", "test_split=test[:500]")


class Setting(NamedTuple):
    """What is measured: the paper's network, or with --quick one that takes seconds."""

    model: AlexNet
    shape: tuple[int, int, int]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    rounds: int
    torch_python: str
    quick: bool = False
    config: tuple[str, ...] = ()  # flags of the loop's recipe


class Call(NamedTuple):
    """A compiled program with its arguments in place, and what it is said to cost."""

    run: Callable[[], Any]
    cost: dict[str, Any]
    text: Callable[[], str]  # of the compiled program


def _compile(traced: jax.stages.Traced) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    start = time.perf_counter()
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    return compiled, {"flops": measure.flops(traced), "compile_s": seconds, **measure.memory(compiled)}


def training_step(model: AlexNet, batch: int, shape: tuple[int, int, int]) -> Call:
    """The train step of `alexnet_jax.train` on one random batch of images [H, W, C]; each call is the next step."""
    data, preprocess = measure.random_batch(shape, batch, model.num_classes)
    optimizer, key = paper_sgd(), jax.random.key(1)
    state = create_state(model, optimizer, shape, 0)
    step = make_train_step(model, optimizer, preprocess, lambda step, plateau: jnp.float32(1e-4))
    compiled, cost = _compile(step.trace(state, data, key))

    def run():
        nonlocal state
        state, metrics = compiled(state, data, key)
        return state, metrics

    return Call(run, cost, compiled.as_text)


def inference(model: AlexNet, batch: int, shape: tuple[int, int, int]) -> Call:
    """Class probabilities of one random batch of images [H, W, C], the central patch alone."""
    data, preprocess = measure.random_batch(shape, batch, model.num_classes)
    params = create_state(model, paper_sgd(), shape, 0).params
    function = jit_forward(lambda params, images: predict(model, params, images, preprocess, ten_crop=False))
    compiled, cost = _compile(function.trace(params, data.images))
    return Call(partial(compiled, params, data.images), cost, compiled.as_text)


def layers(setting: Setting) -> dict[str, Any]:
    """Time, operations and least bytes of each layer, forward and backward, at the largest batch."""
    batch, records, before = setting.batches[-1], [], rates(setting)
    for dtype in setting.dtypes:
        model = setting.model.clone(dtype=jnp.dtype(dtype))
        for layer in layers_of(model, batch, setting.shape):
            arrays = jax.tree.map(_random, (layer.params, layer.inputs))
            outputs = jax.eval_shape(layer.function, *arrays)
            arrays = (*arrays, jax.tree.map(_random, outputs))
            calls = [jax.jit(function) for function in forward_and_backward(layer)]
            times = [measure.median_seconds(partial(call, *arrays), setting.rounds) for call in calls]
            operations = [measure.flops(call.trace(*arrays)) for call in calls]
            for which, i in (("forward", 0), ("backward", 1)):
                records.append({
                    "layer": layer.name, "pass": which, "dtype": dtype, "bytes": least_bytes(layer)[i],
                    "flops": operations[i] - i * operations[0], "seconds": max(times[i] - i * times[0], 1e-9),
                })  # fmt: skip
        records.append(_update(model, setting) | {"dtype": dtype})
    return {"batch": batch, "shape": setting.shape, "rates": rates(setting, before), "layers": records}


def _random(of: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.random.normal(jax.random.key(of.size), of.shape).astype(of.dtype)


def _update(model: AlexNet, setting: Setting) -> dict[str, Any]:
    optimizer = paper_sgd()
    params = create_state(model, optimizer, setting.shape, 0).params
    gradients, opt_state = jax.tree.map(jnp.ones_like, params), optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, gradients):
        updates, opt_state = optimizer.update(gradients, opt_state, params, learning_rate=1e-4)
        return optax.apply_updates(params, updates), opt_state

    operations = measure.flops(update.trace(params, opt_state, gradients))

    def run():
        nonlocal params, opt_state
        params, opt_state = update(params, opt_state, gradients)
        return params

    seconds = measure.median_seconds(run, setting.rounds)
    return {
        "layer": "update", "pass": "update", "seconds": seconds, "flops": operations, "bytes": 5 * measure.size(params)
    }  # fmt: skip


def with_plain(model: AlexNet, *names: str) -> AlexNet:
    """Return the network with these of its operations replaced by XLA's own."""
    return model.clone(
        ops=(model.ops or ops_for(jax.devices()[0]))._replace(**{name: getattr(PLAIN, name) for name in names})
    )


def forms(setting: Setting) -> dict[str, Any]:
    """Return the seconds of a step as it is, and with XLA's for each and all of `BY_HAND`, in alternation."""
    compact = build_model(fashion_mnist.get_config(), 10)
    networks = {
        "the paper's": (setting.model, setting.batches[-1], setting.shape),
        "the default recipe's": (compact, 64, (28, 28, 1)),
    }
    records = []
    for network_name, (model, batch, shape) in networks.items():
        steps = {}
        for names in ((), *((name,) for name in BY_HAND), BY_HAND):
            steps[names] = training_step(with_plain(model, *names), batch, shape).run
        counts = {names: measure.repeats(measure.seconds(run, 2)) for names, run in steps.items()}
        rounds = [{names: measure.seconds(run, counts[names]) for names, run in steps.items()}
                  for _ in range(setting.rounds)]  # fmt: skip
        medians = {names: statistics.median(times[names] for times in rounds) for names in steps}
        records += [
            {"network": network_name, "batch": batch, "plain": names, "seconds": seconds,
             "ratio": seconds / medians[()], "rounds_s": [times[names] for times in rounds]}
            for names, seconds in medians.items()
        ]  # fmt: skip
    return {"records": records}


def rates(setting: Setting, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the device reaches at best, now or `before`: FLOP/s of a matrix product by dtype, bytes/s of a copy."""
    now = {
        "matmul": {dtype: measure.matmul_rate(dtype, setting.rounds) for dtype in setting.dtypes},
        "copy": measure.copy_rate(setting.rounds),
    }
    return jax.tree.map(max, before, now) if before else now


def step(setting: Setting) -> dict[str, Any]:
    """Training and inference over the batches and dtypes, alternating with PyTorch's forms where it is installed."""
    result = {
        "shape": setting.shape, "rates": rates(setting), "memory_bytes": measure.device_memory(), "cases": []
    }  # fmt: skip
    peer = Peer(setting.torch_python)
    try:
        result["torch"] = peer.ask("version")
        if result["torch"]:
            result["differences"] = differences(peer, setting.model, setting.shape)
            print(benchmark_report.agreement(result), flush=True)
            for name, difference in result["differences"].items():
                if not difference < TOLERANCE["logits" if name == "logits" else "gradients"]:
                    raise ValueError(f"{name} differs by {difference:.1e} of its largest element: not the same network")
        elif setting.torch_python != sys.executable:
            raise ValueError(f"--torch-python={setting.torch_python} cannot import torch: {peer.last_words()}")
        else:
            print(f"Measured alone, without PyTorch: {peer.last_words()}", flush=True)
        for dtype in setting.dtypes:
            model = setting.model.clone(dtype=jnp.dtype(dtype))
            for batch in setting.batches:
                for which, make in (("training", training_step), ("inference", inference)):
                    peak = measure.Peak()
                    try:
                        call = make(model, batch, setting.shape)
                        measure.seconds(call.run, 1)
                    except (jax.errors.JaxRuntimeError, MemoryError) as error:  # the other cases are kept
                        reason = (str(error) or "no memory").splitlines()[0]
                        print(f"{which} {dtype} batch {batch} failed: {reason}", flush=True)
                        continue
                    case = {
                        "pass": which, "dtype": dtype, "batch": batch, **call.cost,
                        "bytes": step_bytes(model, batch, setting.shape)[which],
                        **_alternate(call, peer if result["torch"] else None, setting, batch, which, dtype),
                        **peak.record(),
                    }  # fmt: skip
                    result["cases"].append(case)
                    print(benchmark_report.case_line(case), flush=True)
                    del call
        if not result["cases"]:
            raise ValueError("no batch could be measured; give smaller --batches")
        result["rates"] = rates(setting, result["rates"])
    finally:
        peer.close()
    return result


def _forms(setting: Setting, batch: int) -> dict[str, dict[str, bool]]:
    """PyTorch's forms by name; on a CPU, where it takes half a minute to compile one, at the largest batch alone."""
    compiled_too = batch == setting.batches[-1] or jax.default_backend() != "cpu"
    kinds = (False, True) if compiled_too and not setting.quick else (False,)
    return {
        ("compiled" if compiled else "eager") + (", channels-last" if channels_last else ""):
            {"compiled": compiled, "channels_last": channels_last}
        for compiled in kinds for channels_last in (False, True)
    }  # fmt: skip


def _alternate(call: Call, peer: Peer | None, setting: Setting, batch: int, which: str, dtype: str) -> dict[str, Any]:
    """Seconds of a call that has run once, the median of rounds in which each of PyTorch's forms has its turn too."""
    counts, times, errors = {"jax": measure.repeats(measure.seconds(call.run, 1))}, {"jax": []}, {}
    what = {"network": network(setting.model, setting.shape), "batch": batch, "dtype": dtype}
    what["train"] = which == "training"

    def request(ask, name, **what):
        answer = peer.ask(ask, name=name, **what) or {"error": peer.last_words()}
        if "error" in answer:
            errors[name] = answer["error"]
        return answer.get("seconds")

    for name, form in _forms(setting, batch).items() if peer else ():
        if seconds := request("open", name, **what, **form):
            counts[name], times[name] = measure.repeats(seconds), []
    for _ in range(setting.rounds):
        for name, count in counts.items():
            if name == "jax":
                measure.seconds(call.run, 1)  # right after PyTorch's turn a step takes half as long again
                times[name].append(measure.seconds(call.run, count))
            elif name not in errors and (seconds := request("time", name, steps=count)):
                times[name].append(seconds / count)
    if peer:
        peer.ask("close")
    medians = {name: statistics.median(each) for name, each in times.items() if name not in errors}
    return {
        "seconds": medians["jax"], "rounds_s": times["jax"], "images_per_s": batch / medians["jax"],
        "peers": [
            {"form": name, "images_per_s": batch / seconds, "ratio": seconds / medians["jax"], "rounds_s": times[name]}
            for name, seconds in medians.items() if name != "jax"
        ],
        "peer_errors": errors,
    }  # fmt: skip


# Growth.


def _exponent(curve: Sequence[dict[str, Any]]) -> float:
    """p of seconds ≈ c · FLOP^p over the three largest: 1 is linear, less is better."""
    work, seconds = (np.log([point[name] for point in curve[-3:]]) for name in ("flops", "seconds"))
    return float(np.polyfit(work, seconds, 1)[0])


def growth(setting: Setting) -> dict[str, Any]:
    """Seconds of a training step against the image's side, the batch and the width, one at a time."""
    model, side, channels = setting.model, setting.shape[0], setting.shape[2]
    middle = setting.batches[min(1, len(setting.batches) - 1)]

    def point(value, model, batch, side):
        call = training_step(model, batch, (side, side, channels))
        return {"value": value, "flops": call.cost["flops"], "program_bytes": call.cost["program_bytes"],
                "seconds": measure.median_seconds(call.run, setting.rounds)}  # fmt: skip

    sides = (side, 2 * side) if setting.quick else (side // 2, 3 * side // 4, side, 3 * side // 2)
    shares = (1, 2) if setting.quick else (0.25, 0.5, 1, 1.5)
    wider = lambda share: model.clone(widths=tuple(2 * round(share * w / 2) for w in model.widths))  # noqa: E731
    curves = {
        "image side": [point(s, model, middle, s) for s in sides],
        **({"batch": [point(b, model, b, side) for b in setting.batches]} if len(setting.batches) > 1 else {}),
        "width": [point(share, wider(share), middle, side) for share in shares],
    }
    return {"batch": middle, "curves": curves, "exponents": {name: _exponent(curve) for name, curve in curves.items()}}


def devices(setting: Setting) -> dict[str, Any]:
    """Seconds of a data-parallel training step of one batch on 1, 2, 4 … devices; virtual ones share a CPU's cores."""
    batch = setting.batches[-1]
    counts = [n for n in (1, 2, 4, 8) if n <= jax.device_count() and batch % n == 0]
    records = [
        measure_layout(Layout(f"{n} devices", n, 1), setting.model, setting.shape, batch, setting.rounds)
        for n in counts
    ]
    return {
        "batch": batch, "virtual": jax.devices()[0].platform == "cpu",
        "curve": [{"value": n, "seconds": r["step_s"]} for n, r in zip(counts, records, strict=True)],
    }  # fmt: skip


# The loop and the start.


def _config(given: Sequence[str], otherwise: Sequence[str]):
    """The recipe of `main`'s flags, with the fields `otherwise` if they name no file; ValueError if there is none."""
    values, path = absl_flags.FlagValues(), ROOT / "alexnet_jax" / "configs" / "fashion_mnist.py"
    argv = ["benchmark", *given]
    if not any(flag.startswith("--config=") for flag in given):
        argv[1:1] = [f"--config.{field}" for field in otherwise]
    try:
        config_flags.DEFINE_config_file("config", str(path), flag_values=values, sys_argv=argv)
        values(argv)
        values.config.to_dict()  # a file that could not be read shows only now
    except FLAG_ERRORS as error:
        raise ValueError(flag_error(error, argv)) from None
    return values.config


def loop(setting: Setting) -> dict[str, Any]:
    """What the loop adds to the bare step of `main`'s default recipe, or of the one that is given."""
    window, rounds = (10, 1) if setting.quick else (50, 6)
    return _loop(_config(setting.config, LOOP_DATA), window, rounds)


def stream(setting: Setting) -> dict[str, Any]:
    """What the loop adds when it reads ImageNet's recipe from prepared records; their images are of random colours."""
    cpu, random = jax.default_backend() == "cpu", np.random.default_rng(0)
    batch = 8 if setting.quick else 64 if cpu else 512
    window, rounds = (2, 1) if setting.quick else (5, 3) if cpu else (50, 3)
    with tempfile.TemporaryDirectory() as folder:
        for name, count in (("train/a", 4 * batch), ("train/b", 4 * batch), ("validation/a", 1)):
            path = Path(folder) / "images" / name
            path.mkdir(parents=True)
            for i in range(count):
                colours = Image.fromarray(random.integers(0, 256, (32, 40, 3), np.uint8))
                colours.resize((320, 256)).save(path / f"{i}.jpeg")
        command = [sys.executable, "-m", "alexnet_jax.prepare", "--dataset=random", f"--data_dir={folder}/images"]
        done = subprocess.run([*command, f"--out={folder}/data"], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"alexnet_jax.prepare does not prepare: {(done.stderr.splitlines() or ['no word'])[-1]}")
        flags = {
            "dataset": "random_256", "data_dir": f"{folder}/data", "batch_size": batch, "ten_crop": False,
            "eval_every": 6 * window,  # once, at the end: with so few images it would be every few steps
        }  # fmt: skip
        if setting.quick:
            flags["widths"] = "8,16,16,16,16,32,32"
        flags = [f"--config={STREAM_RECIPE}", *(f"--config.{name}={value}" for name, value in flags.items())]
        return _loop(_config(flags, ()), window, rounds)


def _loop(config: ml_collections.ConfigDict, window: int, rounds: int) -> dict[str, Any]:
    """Images/s of the loop of `train_and_evaluate`, as its metrics.jsonl has them, and of the bare step beside it.

    The bare step takes the same state, donated, and one batch that lies on the device. The loop's first window, which
    compiles, is left out; validating and saving, which stop the loop's clock, are not in it.
    """
    config.num_train_steps, config.log_every = 6 * window, window
    bare, looped = [], []
    with tempfile.TemporaryDirectory() as folder:
        use_compilation_cache(f"{folder}/programs")
        task = setup(config)
        train_step = make_train_step(task.model, task.optimizer, task.preprocess, task.learning_rate, task.mesh)
        state = create_state(task.model, task.optimizer, task.preprocess.image_shape, config.seed, task.mesh)
        key, batch = jax.random.key(0), task.train_data.batch(jax.random.key(0), 0)
        task.train_data.close()

        def run():
            nonlocal state
            state, metrics = train_step(state, batch, key)
            return state, metrics

        measure.seconds(run, window)
        for i in range(rounds):
            bare += [config.batch_size / measure.seconds(run, window) for _ in range(5)]
            workdir = Path(folder) / str(i)
            train_and_evaluate(config, workdir)
            lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
            looped += [line["images_per_s"] for line in lines if "images_per_s" in line][1:]
    ratio = statistics.median(bare) / statistics.median(looped)
    return {
        "dataset": config.dataset, "batch": config.batch_size, "mesh": dict(task.mesh.shape), "window": window,
        "bare_images_per_s": statistics.median(bare), "loop_images_per_s": statistics.median(looped),
        "overhead": ratio - 1, "bare": bare, "loop": looped,
    }  # fmt: skip


def start(setting: Setting) -> dict[str, Any]:
    """Seconds from the command to the end of its first step, when nothing is compiled yet and when all is."""
    recipes = ("fashion_mnist",) if setting.quick else ("fashion_mnist", "fashion_mnist_224")
    found = {}
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as folder:
            times = [_time_to_first_step(recipe, Path(folder), name) for name in ("first", "second")]
            programs = list((Path(folder) / "programs").iterdir())
            found[recipe] = {
                "first_s": times[0], "second_s": times[1], "programs": len(programs),
                "cache_bytes": sum(p.stat().st_size for p in programs),
            }  # fmt: skip
    return {"recipes": found}


def _time_to_first_step(recipe: str, folder: Path, name: str) -> float:
    command = [
        sys.executable, "-m", "alexnet_jax.main", f"--workdir={folder / name}",
        f"--config=alexnet_jax/configs/{recipe}.py", f"--compile_cache={folder / 'programs'}",
        *(f"--config.{field}" for field in START_DATA), "--config.num_train_steps=3", "--config.log_every=1",
        "--config.batch_size=32", "--config.ten_crop=False",
    ]  # fmt: skip
    begin, seen = time.perf_counter(), None
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        output = []
        for line in process.stdout:
            output.append(line)
            if seen is None and line.startswith("step 1/"):
                seen = time.perf_counter() - begin
    if process.returncode or seen is None:
        raise ValueError(f"alexnet_jax.main does not train: {''.join(output[-3:])}")
    return seen


def _one_part(part: str, setting: Setting, folder: Path) -> None:
    """Measures a part in this process and puts it into DIR/benchmark.json."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs room on the same GPU
    # Elsewhere the time to compile is one of the figures.
    jax.config.update("jax_enable_compilation_cache", part in ("loop", "stream"))
    if part == "devices":
        sharding.make_mesh(cpu_devices=2 if setting.quick else 4)
    if part not in ("loop", "stream", "start"):  # which start the devices themselves
        cpu = jax.default_backend() == "cpu"
        setting = setting._replace(
            batches=setting.batches or ((1, 8, 32, 64) if cpu else (128, 512, 2048)),
            dtypes=setting.dtypes or (("float32",) if cpu else ("float32", "bfloat16")),
        )
    found = globals()[part](setting)
    about = {
        "device": measure.device(), "date": f"{datetime.date.today()}",
        "jax": jax.__version__, "malloc": os.environ.get("GLIBC_TUNABLES", ""), "quick": setting.quick,
    }  # fmt: skip
    write_json(folder / "benchmark.json", _read(folder) | {part: about | found})


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "benchmark.json"
    try:
        records = json.loads(path.read_text()) if path.exists() else {}
        if all(part in PARTS and {"device", "date", "quick"} <= set(record) for part, record in records.items()):
            return records
    except (ValueError, AttributeError, TypeError):
        pass
    raise ValueError(f"{path} is damaged; delete it, or name another --workdir")


def _setting(flags: argparse.Namespace, config: list[str]) -> Setting:
    """Raises ValueError for flags that make no sense."""
    if not shutil.which(flags.torch_python):
        raise ValueError(f"--torch-python={flags.torch_python}: no such program")
    if unknown := set(flags.parts.split(",")) - set(PARTS):
        raise ValueError(f"--parts: unknown part {min(unknown)!r}; the parts are {', '.join(PARTS)}")
    if bad := [flag for flag in config if not flag.startswith("--config")]:
        raise ValueError(f"unexpected argument {bad[0]!r}")
    _config(config, LOOP_DATA)
    batches = flags.batches.split(",") if flags.batches else ["2", "4"] if flags.quick else []
    if not all(b.isdecimal() and int(b) for b in batches):
        raise ValueError(f"--batches={flags.batches}: expected positive numbers with commas, as in 1,8,32")
    dtypes = flags.dtypes.split(",") if flags.dtypes else ["float32"] if flags.quick else []
    if bad := set(dtypes) - {"float32", "bfloat16"}:
        raise ValueError(f"--dtypes: {min(bad)!r}; expected float32, bfloat16 or both with a comma")
    model, side = AlexNet(), 224
    if flags.quick:
        model, side = AlexNet(num_classes=10, widths=(8, 16, 16, 16, 16, 32, 32)), 64
    return Setting(
        model, (side, side, 3), tuple(sorted(set(map(int, batches)))), tuple(dtypes), 3 if flags.quick else 9,
        flags.torch_python, flags.quick, tuple(config),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="for benchmark.json, benchmark.md, benchmark.png")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"with commas (default: {','.join(PARTS)})")
    parser.add_argument("--batches", help="with commas (default: 1,8,32,64 on a CPU, 128,512,2048 elsewhere)")
    parser.add_argument("--dtypes", help="float32, bfloat16 or both (default: float32 on a CPU, both elsewhere)")
    parser.add_argument("--quick", action="store_true", help="a small network and few steps, to see that it works")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has PyTorch (default: this one)")
    parser.epilog = "Flags --config=FILE and --config.FIELD=VALUE, as of alexnet_jax.main, set the recipe of the loop."
    flags, config = parser.parse_known_args(argv)
    arguments = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and the part's process with it
    failed = []
    try:
        setting, parts = _setting(flags, config), list(dict.fromkeys(flags.parts.split(",")))
        try:
            flags.workdir.mkdir(parents=True, exist_ok=True)
            write_json(flags.workdir / "benchmark.json", _read(flags.workdir))
        except OSError as error:
            raise ValueError(f"--workdir={flags.workdir}: {error.strerror}; expected a folder to write to") from None
        stops = []
        for i, part in enumerate(parts):
            if len(parts) == 1:
                _one_part(part, setting, flags.workdir)
                continue
            print(f"Part {i + 1} of {len(parts)}: {part}", flush=True)
            command = [sys.executable, "-m", "experiments.benchmark", *arguments, f"--parts={part}"]
            before = signal.signal(signal.SIGINT, lambda number, frame: stops.append(number))  # the part has it too
            if subprocess.run(command).returncode:
                failed.append(part)
            signal.signal(signal.SIGINT, before)
            if stops:
                sys.exit(130)
        records = _read(flags.workdir)
        (flags.workdir / "benchmark.md").write_text(benchmark_report.markdown(records))
        benchmark_report.plot(records, flags.workdir / "benchmark.png")
    except (ValueError, UserError, OSError) as error:
        sys.exit(f"Error: {error}")
    except (KeyboardInterrupt, Interrupted) as stop:
        print("Interrupted; the parts that were measured are kept", file=sys.stderr, flush=True)
        os._exit(128 + getattr(stop, "signal", signal.SIGINT))  # what XLA still computes would crash on the way out
    if failed:
        sys.exit(f"Error: --parts={','.join(failed)} failed; what else was measured is in {flags.workdir}")
    if len(parts) == 1:  # otherwise each part has shown its own
        print(f"{benchmark_report.section(parts[0], records[parts[0]])}\n")
    else:
        print(f"Written to {flags.workdir}")


if __name__ == "__main__":
    use_huge_pages()  # PyTorch too, which is started from here
    main()
