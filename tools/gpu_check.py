"""What a GPU does with this package, in one prepared run of a few minutes; results as JSON, part by part.

    python tools/gpu_check.py --out gpu.json                  # everything, at most 240 s
    python tools/gpu_check.py --out gpu.json --parts exits,rounds
    python tools/gpu_check.py --out small.json --device cpu   # small sizes, to try the script itself
    python tools/gpu_check.py --out assets/gpu_h200.json --record one.json,two.json --beside "..."

A part that fails or takes too long says so in the file and costs the others nothing."""

import argparse, json, os, platform, signal, statistics, subprocess, sys, time, traceback, warnings
from pathlib import Path
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARES = [0.5, 0.2, 0.15, 0.15]


def say(*words):
    print(f"[{time.perf_counter() - START:5.0f} s]", *words, flush=True)


START = time.perf_counter()


def machine(device):
    "What was measured on."
    gpu = torch.cuda.get_device_name(0) if device == "cuda" else None
    return dict(
        gpu=gpu,
        python=platform.python_version(),
        torch=torch.__version__,
        cpus=os.cpu_count(),
        processor=platform.machine(),
    )


def synced(device):
    if device == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------- early exit


def microseconds(work, device, runs, warm=3):
    "Median time of a call."
    times = []
    for i in range(warm + runs):
        synced(device)
        start = time.perf_counter()
        work()
        synced(device)
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[warm:])


def through(f, x, b):
    "A function that sends x through f, b images at a time."
    return lambda: [f(x[i : i + b]) for i in range(0, len(x), b)]


def exits_network(small):
    from darkdistill_nb.exits.networks import vit

    torch.manual_seed(0)
    if small:
        sizes = dict(img_size=16, patch_size=4, embed_dim=48, num_heads=3, depth=4)
        return vit("vit_tiny_patch16_224", exits=(1, 2, 3, 4), n_classes=10, **sizes)
    return vit(img_size=32, patch_size=4)


def exits_of(net, x, T, dtype, device, b, runs):
    "Times of one precision and batch, in microseconds an image: without exits, and by every plan."
    from darkdistill_nb.exits.runner import PLANS, ExitRunner

    n = min(len(x), {1: 32, 8: 128}.get(b, 256))
    row = dict(precision=str(dtype)[6:], batch=b, us={}, errors={})
    x = x[:n]
    last = lambda r: r.always_last
    told = lambda r: lambda x: r.always_last(x).argmax(-1).cpu()
    jobs = {
        "always last, eager": ("gather", last),
        "always last, recorded": ("look", last),
        "always last, eager, told": ("gather", told),  # as a runner does: the answers reach the host
        "always last, recorded, told": ("look", told),
        **{p: (p, lambda r: r) for p in (*PLANS, "auto")},
    }
    for name, (plan, what) in jobs.items():
        try:
            r = ExitRunner(net, T, dtype=dtype, device=device, plan=plan)
            work = through(what(r), x, b)
            row["us"][name] = microseconds(work, device, runs) / n
            if name == "auto":
                row["plan"] = {k: str(p) for k, p in r.plan.items()}
            if name == "gather":
                exit, macs = r(x).exit, r(x).macs.double().mean()
        except Exception as e:
            row["errors"][name] = f"{type(e).__name__}: {str(e)[:300]}"
    last = net.macs(heads=False)[-1] + net.exits[-1].fc.weight.numel()
    row["saving"] = float(last / macs)
    row["exits"] = torch.bincount(exit, minlength=len(net)).tolist()
    return row


def shares_of(rows):
    "How much of the saved operations is saved time: beside the same batch, and beside the best batch."
    for d in {r["precision"] for r in rows}:
        own = [r for r in rows if r["precision"] == d]
        times = lambda r, told: [
            v for k, v in r["us"].items() if k.startswith("always") and k.endswith("told") == told
        ]
        full = lambda r: min(times(r, False))
        best = min(map(full, own))
        for r in own:
            t = r["us"].get("auto", r["us"].get("gather"))
            r["speedup"] = full(r) / t
            r["share"] = full(r) / t / r["saving"]
            r["share_told"] = min(times(r, True)) / t / r["saving"]
            r["share_best"] = best / t / r["saving"]
            r["us_a_batch_over_last"] = {
                p: (r["us"][p] - full(r)) * r["batch"] for p in r["us"] if p[:6] != "always"
            }


def exits(device, small):
    "Realised share of early exit: how much of the saved operations is saved time."
    from darkdistill_nb.exits.inference import budget_thresholds
    from darkdistill_nb.exits.scores import confidence
    from darkdistill_nb.exits.runner import ExitRunner

    net = exits_network(small).eval().to(device)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(16 if small else 256, *net.input_shape, generator=g).to(device)
    base = ExitRunner(net, [0.0] * len(net), device=device, plan="gather")
    T = budget_thresholds(confidence(base.all_exits(x)).cpu(), SHARES)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for b in (1, 8) if small else (256, 32, 8, 1):
            rows.append(exits_of(net, x, T, dtype, device, b, 2 if small else 7))
            say(json.dumps(rows[-1])[:600])
            shares_of(rows)
            yield dict(rows=rows)
    yield dict(rows=rows, agree=exits_agree(net, x, T, device))


def exits_agree(net, x, T, device):
    "Share of images with the exit of the loop over single images, and the largest difference of logits."
    from darkdistill_nb.exits.runner import PLANS, ExitRunner, loop_exits

    x, out = x[:48], {}
    want, logits, _ = loop_exits(net, x, T)
    for plan in PLANS:
        r = ExitRunner(net, T, device=device, plan=plan)
        o = [r(x, logits=True) for _ in range(3)][-1]
        same = o.exit == want
        worst = (o.logits.cpu() - logits.cpu())[same].abs().max()
        out[plan] = dict(same=float(same.float().mean()), logits=float(worst))
    return out


# ---------------------------------------------------------------- federations


def play(method, build, data, clients, rounds, device, **how):
    "Seconds per round of a simulation, the first two rounds apart, and its accuracies."
    from darkdistill_nb.federated.engine import simulate

    train, test = data
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        synced(device)
        run = simulate(
            method, build, train, test, clients, rounds, 0, rounds, device=device, progress=False, **how
        )
    log = run.log[min(2, rounds - 1) :]
    pick = lambda k: statistics.median(r[k] for r in log)
    return dict(
        rounds=rounds,
        seconds_clients=pick("seconds_clients"),
        seconds_server=pick("seconds_server"),
        first=run.log[0]["seconds"],
        accuracy=[round(a, 4) for a in run.log[-1]["accuracy"]],
        loss=run.log[-1]["loss"],
        warnings=sorted({str(w.message)[:200] for w in said}),
    )


def tried(name, f):
    "What f returns, or how it failed."
    try:
        start = time.perf_counter()
        out = f()
        out["wall"] = time.perf_counter() - start
    except TimeUp:
        raise
    except Exception as e:
        text = traceback.format_exc().splitlines()[-8:]
        out = dict(error=f"{type(e).__name__}: {str(e)[:400]}", trace=text)
    say(name, json.dumps(out)[:420])
    return out


def digits():
    from darkdistill_nb.core.datasets import load

    return load("digits")[:2]


def methods(device, small):
    "Every registered method on this device beside the CPU: one after the other, and stacked."
    from darkdistill_nb.core.registry import METHODS
    from darkdistill_nb.exits.networks import cnn
    from darkdistill_nb.federated.method import make_clients

    data = digits()
    clients = make_clients(data[0].y, 8, seed=0)
    build = lambda: cnn(data[0].shape, 10, width=16)
    out = {}
    for name in list(METHODS)[:2] if small else METHODS:
        for where, how in (("cpu", {}), (device, {}), (device, dict(stack=True))):
            key = f"{name}, {where}{', stacked' if how else ''}"
            job = lambda: play(METHODS.make(name, lr=0.02), build, data, clients, 2, where, **how)
            out[key] = tried(key, job)
            yield out


def cifar(small, n):
    "CIFAR-10 where it is there, else random images of its shape."
    from darkdistill_nb.core.data import ArrayData
    from darkdistill_nb.core.datasets import load

    if os.environ.get("DARKDISTILL_DATA") and not small:
        try:
            train, test = load("cifar10")[:2]
            return train, test.subset(slice(0, 2000))
        except (OSError, ValueError) as e:
            say("no CIFAR-10:", e)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=g)
    data = ArrayData(x, torch.randint(10, (n,), generator=g), range(10))
    return data, data.subset(slice(0, n // 5))


WAYS = {
    "loop": {},
    "stacked": dict(stack=True),
    "stacked, bf16": dict(stack=True, precision="bf16"),
    "loop, bf16": dict(precision="bf16"),
}


def rounds(device, small):
    "Seconds per round: digits and CIFAR-10, one client after the other and stacked."
    from darkdistill_nb.core.registry import METHODS
    from darkdistill_nb.exits.networks import cnn
    from darkdistill_nb.federated.method import make_clients

    out = {}
    few = 1 if small else 4
    for title, data, width, batch in (
        ("cifar10", cifar(small, 200), 8 if small else 64, 32),
        ("digits", digits(), 16 if small else 32, 16),
    ):
        clients = make_clients(data[0].y, 4 if small else 20, seed=0)
        build = lambda: cnn(data[0].shape, 10, width=width)
        for name in ("eefl", "calibrated_eefl", "darkdistill"):
            for way, how in list(WAYS.items())[: 4 if name == "eefl" and title == "cifar10" else 2]:
                method = METHODS.make(name, lr=0.02, batch_size=batch)
                key = f"{title}, {name}, {way}"
                out[key] = tried(key, lambda: play(method, build, data, clients, few, device, **how))
                yield out


def deit(device, small):
    "A DeiT-tiny-sized federation: 10 clients with 400 images of 224 pixels, and what 500 rounds would take."
    from darkdistill_nb.core.data import ArrayData
    from darkdistill_nb.core.registry import METHODS
    from darkdistill_nb.exits.networks import vit
    from darkdistill_nb.federated.method import make_clients

    side, n = (32, 80) if small else (224, 4000)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=g)
    y = torch.randint(10, (n,), generator=g)
    own = ArrayData(x, y, range(10), mean=[0.5] * 3, std=[0.25] * 3)
    data = own.to(device), own.subset(slice(0, n // 10)).to(device)
    clients = make_clients(y, 10, gamma=100.0, valid=0.0, seed=0, tiers=(0.3, 0.3, 0.2, 0.2))
    sizes = dict(img_size=32, patch_size=8, embed_dim=48, num_heads=3, depth=4) if small else {}
    exits = (1, 2, 3, 4) if small else (3, 6, 9, 12)
    build = lambda: vit("vit_tiny_patch16_224", exits=exits, n_classes=10, **sizes)
    out = {}
    for name, way in (
        ("eefl", "stacked, bf16"),
        ("eefl", "loop, bf16"),
        ("eefl", "stacked"),
        ("eefl", "loop"),
        ("darkdistill", "stacked, bf16"),
    )[: 2 if small else 5]:
        method = METHODS.make(name, lr=0.01, batch_size=32, participation=1.0)
        row = tried(f"deit, {name}, {way}", lambda: play(method, build, data, clients, 3, device, **WAYS[way]))
        if "seconds_clients" in row:
            each = row["seconds_clients"] + row["seconds_server"]
            row["minutes_for_500"] = each * 500 / 60
        out[f"{name}, {way}"] = row
        yield out


# ---------------------------------------------------------------- tests


def tests(device, small):
    "The tests that need a GPU; on a CPU they are collected only."
    words = [sys.executable, "-m", "pytest", "tests/test_cuda.py", "-q", "-p", "no:cacheprovider"]
    words += ["--collect-only"] if small else ["--durations=5"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=LEFT)
    say(run.stdout[-1500:])
    yield dict(status=run.returncode, tail=run.stdout[-6000:], errors=run.stderr[-1000:])


# ---------------------------------------------------------------- a Record of finished runs


def started_by(found):
    "The command of a run; of one that did not keep it, as far as its parts tell."
    return found.get("command") or f"python tools/gpu_check.py --parts {','.join(found['parts'])}"


def rows_of(found, run):
    "What a run measured, as rows that name the run: early exit, federations, tests."
    parts = {k: (p["ended"], p["found"]) for k, p in found["parts"].items() if p["found"]}
    out = dict(exits=[], federations=[], tests=[])
    for part, (ended, got) in parts.items():
        own = dict(run=run, part=part, ended=ended)
        if part == "exits":
            out["exits"] += [own | row for row in got["rows"]]
        elif part == "tests":
            last = got["tail"].strip().splitlines()[-1]
            out["tests"].append(own | dict(status=got["status"], last=last))
        else:
            out["federations"] += [own | dict(what=k) | row for k, row in got.items()]
    return out


def recorded(files, beside=""):
    "One `Record` of the results of several runs on one kind of machine; all rows of all runs are kept."
    from darkdistill_nb.core.records import Record

    founds = [json.loads(Path(f).read_text()) for f in files]
    machines = [f["machine"] for f in founds]
    if any(m != machines[0] for m in machines):
        raise ValueError(f"the files tell of different machines: {machines}")
    rows = [rows_of(f, i + 1) for i, f in enumerate(founds)]
    info = {k: [r for part in rows for r in part[k]] for k in rows[0]}
    info["agree"] = [f["parts"].get("exits", {}).get("found", {}).get("agree") for f in founds]
    runs = [dict(run=i + 1, started=f["started"], command=started_by(f)) for i, f in enumerate(founds)]
    m = machines[0]
    return Record(
        config=dict(what="gpu_check", beside=beside),
        runs=runs,
        info=info,
        versions=dict(python=m["python"], torch=m["torch"]),
        hardware=dict(gpu=m["gpu"], cpus=m["cpus"], machine=m["processor"]),
        command="; ".join(r["command"] for r in runs),
        created=founds[-1]["started"].replace(" ", "T") + "Z",
        seconds=sum(p.get("seconds", 0) for f in founds for p in f["parts"].values()),
    )


def write_record(files, beside, out):
    "The record of finished runs, as a file."
    from dataclasses import asdict
    from darkdistill_nb.core.records import check_json, write_atomic

    write_atomic(Path(out), check_json(asdict(recorded(files, beside))).encode())


LEFT = 120
PARTS = dict(exits=exits, rounds=rounds, tests=tests, deit=deit, methods=methods)
LIMITS = dict(exits=70, rounds=90, tests=60, deit=60, methods=60)  # seconds


class TimeUp(BaseException):
    "A part has had its time; like Ctrl-C it is nobody's fault, so no round leaves a client out for it."


def with_limit(seconds, part, keep):
    "Run a part and keep what it yields; how it ended."
    global LEFT
    LEFT = seconds

    def stop(*_):
        raise TimeUp

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        for found in part:
            keep(found)
        return "whole"
    except (TimeUp, subprocess.TimeoutExpired):
        return f"stopped after {seconds:.0f} s"
    except Exception as e:
        say(traceback.format_exc()[-1500:])
        return f"{type(e).__name__}: {str(e)[:500]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", required=True, help="file for the results")
    p.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    p.add_argument("--seconds", type=float, default=240, help="for all parts together")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--record", help="results of finished runs, with commas between: make a Record")
    p.add_argument("--beside", default="", help="what else ran on that machine, for the Record")
    a = p.parse_args(argv)
    if a.record:
        write_record(a.record.split(","), a.beside, a.out)
        return 0
    names = a.parts.split(",")
    if wrong := [n for n in names if n not in PARTS]:
        p.error(f"unknown parts: {', '.join(wrong)}; choose of {', '.join(PARTS)}")
    if a.device == "cuda" and not torch.cuda.is_available():
        p.error("there is no GPU here; --device cpu tries the script itself with small sizes")
    results = dict(
        machine=machine(a.device),
        started=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        command=" ".join(["python", *sys.argv]),
        parts={},
    )

    def write():
        Path(a.out).write_text(json.dumps(results, indent=1) + "\n")

    def keep(found):
        results["parts"][name]["found"] = found
        write()

    for name in names:
        left = a.seconds - (time.perf_counter() - START)
        results["parts"][name] = row = dict(ended="left out: no time", found={})
        if left > 5:
            say(f"== {name}")
            start = time.perf_counter()
            part = PARTS[name](a.device, a.device == "cpu")
            row["ended"] = with_limit(min(left, LIMITS[name]), part, keep)
            row["seconds"] = time.perf_counter() - start
            say(f"== {name}: {row['ended']}")
        write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
