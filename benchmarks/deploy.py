"""A quantized model at its users': latency, size of the file, and what making it costs, beside other quantizers.

ResNet-18 (one image of 224x224) and DistilBERT-base (one sentence of 128 tokens), with random weights and data: latency,
size and cost count, accuracy does not. `rarefy` is prepare, calibrate with 32 samples and export.to_onnx; the peers are
ONNX Runtime's quantize_static (its defaults, and unsigned activations with weights per channel) and quantize_dynamic, and
NNCF for OpenVINO. Peers that are not installed are said to be so.

Latency is processor time on one thread, of one sample, all files in turn; ratios are to ONNX Runtime's FP32. OpenVINO
computes what is left in float in float32, as the others do, though it would take bfloat16 where the processor has it.
LibTorch's ratio is the other way round: eager FP32 over int8.

Cost is measured in a process of its own for each, from the float model (for peers: its ONNX file) and the samples in memory
to the finished file: wall seconds on all cores, processor seconds, and the peak of resident memory, imports included.
"startup" is what comes once in a process, before: imports, and for rarefy the export of one linear layer, which imports
torch's exporter. "verified" is a second export of the same model, with the comparison that to_onnx makes by default.

    python benchmarks/deploy.py [--model resnet18|distilbert|all] [--repeats 21] [--only NAME ...]
                                [--folder DIR [--reuse]] [--quick] [--json]
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import models
import torch
from timing import interleaved
from torch import Tensor, nn

SAMPLES, BATCH = 32, 8
MIB = 1 << 20

Inputs = dict[str, Tensor]


class Unavailable(Exception):
    """A row that cannot be measured here, and why."""


# ---- models ---------------------------------------------------------------------------------------------------------


class AddBlock(models.BasicBlock):
    """The block with a module for its addition, so that the addition is quantized too."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu_out(self.add(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))), identity))


class ImageClassifier(models.ResNet18):
    """ResNet-18 over such blocks, called by name like a model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        import rarefy as rf

        for block in [module for module in self.modules() if isinstance(module, models.BasicBlock)]:
            block.__class__, block.add, block.relu_out = AddBlock, rf.nn.Add(), nn.ReLU()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return super().forward(pixel_values)


def distilbert() -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise Unavailable(f"transformers is not installed: {error}") from error
    return transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig())


def images(count: int) -> Inputs:
    return {"pixel_values": torch.randn(count, 3, 224, 224)}


def sentences(count: int) -> Inputs:
    return {"input_ids": torch.randint(30522, (count, 128)), "attention_mask": torch.ones(count, 128, dtype=torch.long)}


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and the goals: at most so much of each, but at least so much for LibTorch."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    onnxruntime: float
    openvino: float
    mebibytes: float
    seconds: float
    peak_mebibytes: float
    libtorch: float = 2.5


CASES = {
    "resnet18": Case(ImageClassifier, images, 0.32, 0.28, 11.4, 1.5, 600),
    "distilbert": Case(distilbert, sentences, 0.33, 0.25, 64.7, 7.0, 1200),
}


def make(case: Case) -> tuple[nn.Module, list[Inputs]]:
    """The float model, and the samples in batches."""
    torch.manual_seed(0)
    model = case.build().eval()
    samples = case.inputs(SAMPLES)
    return model, [{key: x[i : i + BATCH] for key, x in samples.items()} for i in range(0, SAMPLES, BATCH)]


def single(batches: list[Inputs]) -> list[dict[str, object]]:
    """The samples one by one, as arrays."""
    return [{key: x[i : i + 1].numpy() for key, x in batch.items()} for batch in batches for i in range(BATCH)]


def calibrated(model: nn.Module, batches: list[Inputs]) -> nn.Module:
    import rarefy as rf

    example = {key: x[:1] for key, x in batches[0].items()}
    prepared = rf.quantization.prepare(model, rf.quantization.QConfig.int8(), example, inplace=True)
    return rf.quantization.calibrate(prepared, batches)


# ---- making a file, in a process of its own --------------------------------------------------------------------------


class Cost:
    """Seconds of what runs inside of it."""

    def __enter__(self) -> "Cost":
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._wall
        self.processor_seconds = time.process_time() - self._cpu


def with_rarefy(case: Case, float_file: Path, file: Path) -> dict[str, float]:
    with Cost() as startup:
        import rarefy as rf

        rf.export.to_onnx(nn.Linear(4, 4), torch.zeros(1, 4), file, verify=False)
    model, batches = make(case)
    example = {key: x[:1] for key, x in batches[0].items()}
    with Cost() as cost:
        with Cost() as calibration:
            model = calibrated(model, batches)
        rf.export.to_onnx(model, example, file, verify=False)
    peak = peak_mebibytes()
    with Cost() as verified:
        rf.export.to_onnx(model, example, file)
    return {
        **costs(cost, startup),
        "peak_mebibytes": peak,
        "calibration_seconds": round(calibration.seconds, 2),
        "verified_seconds": round(verified.seconds, 2),
        "verified_peak_mebibytes": peak_mebibytes(),
    }


def with_onnxruntime(kind: str) -> Callable[[Case, Path, Path], dict[str, float]]:
    def quantize(case: Case, float_file: Path, file: Path) -> dict[str, float]:
        try:
            with Cost() as startup:
                from onnxruntime import quantization as ort
                from onnxruntime.quantization.shape_inference import quant_pre_process
        except ImportError as error:
            raise Unavailable(f"onnxruntime is not installed: {error}") from error

        class Reader(ort.CalibrationDataReader):
            def __init__(self, samples: list[dict[str, object]]) -> None:
                self.samples = iter(samples)

            def get_next(self) -> dict[str, object] | None:
                return next(self.samples, None)

        _, batches = make(case)
        samples = single(batches)
        with Cost() as cost:
            if kind == "dynamic":
                ort.quantize_dynamic(float_file, file, weight_type=ort.QuantType.QInt8)
            else:
                ready = file.with_suffix(".ready.onnx")
                quant_pre_process(float_file, ready, skip_symbolic_shape=True)
                options = {"U8S8": {"activation_type": ort.QuantType.QUInt8, "per_channel": True}, "S8S8": {}}[kind]
                ort.quantize_static(ready, file, Reader(samples), weight_type=ort.QuantType.QInt8, **options)
        return costs(cost, startup) | {"peak_mebibytes": peak_mebibytes()}

    return quantize


def with_nncf(case: Case, float_file: Path, file: Path) -> dict[str, float]:
    try:
        with Cost() as startup:
            import nncf
            import openvino
    except ImportError as error:
        raise Unavailable(f"nncf or openvino is not installed: {error}") from error
    _, batches = make(case)
    samples = single(batches)
    with Cost() as cost:
        model = openvino.Core().read_model(float_file)
        kind = nncf.ModelType.TRANSFORMER if "input_ids" in samples[0] else None
        quantized = nncf.quantize(model, nncf.Dataset(samples), subset_size=SAMPLES, model_type=kind)
        openvino.save_model(quantized, file)
    return costs(cost, startup) | {"peak_mebibytes": peak_mebibytes()}


def costs(cost: Cost, startup: Cost) -> dict[str, float]:
    numbers = {"seconds": cost.seconds, "processor_seconds": cost.processor_seconds, "startup_seconds": startup.seconds}
    return {key: round(value, 2) for key, value in numbers.items()}


def peak_mebibytes() -> float:
    """Of this program alone: getrusage's ru_maxrss begins at that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return round(int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1)) / 1024)


QUANTIZERS: dict[str, tuple[str, Callable[[Case, Path, Path], dict[str, float]]]] = {
    "rarefy": ("rarefy.onnx", with_rarefy),
    "ORT static U8S8 per channel": ("u8s8.onnx", with_onnxruntime("U8S8")),
    "ORT static S8S8": ("s8s8.onnx", with_onnxruntime("S8S8")),
    "ORT dynamic": ("dynamic.onnx", with_onnxruntime("dynamic")),
    "NNCF": ("nncf.xml", with_nncf),
}


def run_child(name: str, model: str, folder: Path) -> dict[str, object]:
    """What a quantizer says about its cost, or why there is nothing to say."""
    command = [sys.executable, __file__, "--child", name, "--model", model, "--folder", os.fspath(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode or not lines:
        if name == "rarefy":
            raise RuntimeError(f"quantizing with rarefy failed:\n{result.stderr}")
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        return {"unavailable": f"failed: {last[:200]}"}
    return json.loads(lines[-1])


# ---- running it ------------------------------------------------------------------------------------------------------


def in_onnxruntime(file: Path, sample: dict[str, object]) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, sample)


def in_openvino(file: Path, sample: dict[str, object]) -> Callable[[], object]:
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    model = core.read_model(file)
    model.reshape({model.input(key): x.shape for key, x in sample.items()})
    request = core.compile_model(model, "CPU", options).create_infer_request()
    return lambda: request.infer(sample)


RUNTIMES = {"ONNX Runtime": in_onnxruntime, "OpenVINO": in_openvino}


def in_libtorch(case: Case) -> dict[str, Callable[[], object]]:
    """Eager FP32, and the same model with integer layers."""
    import rarefy as rf

    def call(model: nn.Module, example: Inputs) -> Callable[[], object]:
        def run() -> None:
            with torch.inference_mode():
                model(**example)

        return run

    model, batches = make(case)
    example = {key: x[:1] for key, x in batches[0].items()}
    plain, _ = make(case)
    integer = rf.quantization.convert(calibrated(model, batches), example)
    return {"LibTorch FP32": call(plain, example), "LibTorch int8": call(integer, example)}


def file_bytes(file: Path) -> int:
    """Of the file, and of the one beside it in OpenVINO's format."""
    return sum(part.stat().st_size for part in {file, file.with_suffix(".bin")} if part.exists())


def latency(name: str, case: Case, folder: Path, made: dict[str, Path], repeats: int, warmup: int) -> list[dict]:
    _, batches = make(case)
    sample = single(batches)[0]
    functions: dict[str, Callable[[], object]] = {}
    sizes: dict[str, int] = {}
    records: list[dict] = []
    for row, file in {"FP32": folder / "float.onnx", **made}.items():
        for runtime, load in RUNTIMES.items():
            key = f"{row} in {runtime}"
            if runtime == "ONNX Runtime" and file.suffix == ".xml":
                continue
            try:
                functions[key] = load(file, sample)
                functions[key]()
                sizes[key] = file_bytes(file)
            except Exception as error:  # a peer's file that fails is a result, ours that fails is an error
                functions.pop(key, None)
                if row == "rarefy" and not isinstance(error, ImportError):
                    raise
                records.append(
                    {"row": key, "unavailable": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
                )
    functions |= in_libtorch(case)
    torch.set_num_threads(1)
    seconds = interleaved(functions, repeats, warmup, clock=time.process_time)
    base = seconds["FP32 in ONNX Runtime"]
    for key, value in seconds.items():
        record: dict = {"row": key, "milliseconds": round(value * 1e3, 2), "ratio": round(value / base, 3)}
        if key == "rarefy in ONNX Runtime":
            record["goal"] = case.onnxruntime
        elif key == "rarefy in OpenVINO":
            record["goal"] = case.openvino
        elif key == "LibTorch int8":
            record |= {"faster": round(seconds["LibTorch FP32"] / value, 2), "goal": case.libtorch}
        if key in sizes:
            record["mebibytes"] = round(sizes[key] / MIB, 1)
            if key.startswith("rarefy"):
                record["mebibytes_goal"] = case.mebibytes
        records.append(record)
    return [{"benchmark": "deploy", "model": name, "what": "latency", **record} for record in records]


def measure(name: str, case: Case, rows: list[str], folder: Path, reuse: bool, repeats: int, warmup: int) -> list[dict]:
    import rarefy as rf

    if not (reuse and (folder / "float.onnx").exists()):
        model, batches = make(case)
        example = {key: x[:1] for key, x in batches[0].items()}
        rf.export.to_onnx(model, example, folder / "float.onnx", verify=False)
        del model
    records: list[dict] = []
    made: dict[str, Path] = {}
    for row in rows:
        if reuse and (folder / QUANTIZERS[row][0]).exists():
            made[row] = folder / QUANTIZERS[row][0]
            continue
        print(f"  {name}: {row}", file=sys.stderr)
        cost = run_child(row, name, folder)
        if "unavailable" not in cost:
            made[row] = folder / QUANTIZERS[row][0]
        if row == "rarefy":
            cost |= {"seconds_goal": case.seconds, "peak_mebibytes_goal": case.peak_mebibytes}
        records.append({"benchmark": "deploy", "model": name, "what": "cost", "row": row, **cost})
    return records + latency(name, case, folder, made, repeats, warmup)


def show(records: list[dict]) -> None:
    def cell(value: object) -> str:
        return "-" if value is None else f"{value:g}"

    if any(record["what"] == "cost" for record in records):
        print(f"\n{records[0]['model']}: cost of making the file")
        print(
            f"{'':28} {'seconds':>8} {'goal':>6} {'processor':>10} {'peak MiB':>9} {'goal':>6} {'startup':>8} {'verified':>9}"
        )
    for r in records:
        if "unavailable" in r:
            print(f"{r['row']:28} {r['unavailable']}")
        elif r["what"] == "cost":
            print(
                f"{r['row']:28} {cell(r['seconds']):>8} {cell(r.get('seconds_goal')):>6} "
                f"{cell(r['processor_seconds']):>10} {cell(r['peak_mebibytes']):>9} "
                f"{cell(r.get('peak_mebibytes_goal')):>6} {cell(r['startup_seconds']):>8} {cell(r.get('verified_seconds')):>9}"
            )
    print(f"\n{records[0]['model']}: one sample, one thread; ratios to FP32 in ONNX Runtime")
    print(f"{'':44} {'ms':>8} {'ratio':>6} {'goal':>6} {'MiB':>6} {'goal':>6} {'faster':>7}")
    for r in records:
        if r["what"] == "latency" and "unavailable" not in r:
            print(
                f"{r['row']:44} {cell(r['milliseconds']):>8} {cell(r['ratio']):>6} {cell(r.get('goal')):>6} "
                f"{cell(r.get('mebibytes')):>6} {cell(r.get('mebibytes_goal')):>6} {cell(r.get('faster')):>7}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*CASES, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="quantizers whose name contains one of these")
    parser.add_argument("--folder", type=Path, help="where the files go, and stay")
    parser.add_argument("--reuse", action="store_true", help="do not make files again that the folder has")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of tables")
    parser.add_argument("--child", choices=QUANTIZERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")

    if arguments.child:
        file, quantize = QUANTIZERS[arguments.child]
        try:
            result = quantize(CASES[arguments.model], arguments.folder / "float.onnx", arguments.folder / file)
        except Unavailable as reason:
            result = {"unavailable": str(reason)}
        print(json.dumps(result))
        return

    rows = [
        row
        for row in QUANTIZERS
        if not arguments.only or any(wanted.lower() in row.lower() for wanted in arguments.only)
    ]
    repeats, warmup = (3, 1) if arguments.quick else (arguments.repeats, 2)
    for name, case in CASES.items():
        if arguments.model not in (name, "all"):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = (arguments.folder or Path(temporary)).absolute()
            folder = folder / name
            folder.mkdir(parents=True, exist_ok=True)
            try:
                records = measure(name, case, rows, folder, arguments.reuse, repeats, warmup)
            except Unavailable as reason:
                print(f"{name}: {reason}", file=sys.stderr)
                continue
        if arguments.json:
            for record in records:
                print(json.dumps(record), flush=True)
        else:
            show(records)


if __name__ == "__main__":
    main()
