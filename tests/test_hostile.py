"""Hostile arguments for every scalar parameter: an error of one sentence that names the argument, or a documented meaning.

No accepted nonsense, no error from deep inside, no hang. The calls are in hostile_calls.py."""

import importlib, inspect, math, pkgutil, re, signal, traceback, warnings
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
import darkdistill_nb
from hostile_calls import CALLS

pytestmark = pytest.mark.usefixtures("one_thread")
nan, inf = math.nan, math.inf
HANG = 20  # s for one call
LEAST = (308, 625)  # callables, parameters; they only grow
ERRORS = (ValueError, TypeError, FileNotFoundError, FloatingPointError)

EXPORTED, PLAIN = {}, (int, float, str, bool)
for info in pkgutil.walk_packages(darkdistill_nb.__path__):
    module = importlib.import_module("darkdistill_nb." + info.name)
    for key in getattr(module, "__all__", []):
        if callable(getattr(module, key)):
            EXPORTED[f"{info.name}.{key}"] = getattr(module, key)


def scalars(name):
    "The parameters of an exported callable that are annotated as int, float, str or bool."
    try:
        sig = inspect.signature(EXPORTED[name])
    except ValueError:
        return {}
    return {k: p for k, p in sig.parameters.items() if p.annotation in PLAIN}


PARAMS = [(name, k) for name in CALLS for k in scalars(name)]
odd = st.sampled_from([[], {}, 1j, object(), b"1", (1,)])
number_words = st.sampled_from(["x", "", "1", "nan"])
HOSTILE = {
    int: st.one_of(
        st.sampled_from([nan, inf, -inf, 1.5, None]),
        st.floats(0.01, 0.99),
        st.integers(-(10**9), -(10**3)),
        number_words,
        odd,
    ),
    float: st.one_of(st.sampled_from([nan, inf, -inf, None]), number_words, odd),
    bool: st.one_of(st.sampled_from([2, 0, 1, None, "no", "", nan]), odd),
    str: st.one_of(st.sampled_from(["nonsense", "", None, 3, nan, True]), odd),
}


# what a message calls the argument, where that is not the parameter's name
WORDS = {
    "distributed.student_net.arch": "arch|name",
    "early_exit.build_net.arch": "arch|name",
    "exit_experiments.three_parts.name": "data set",
    "exit_training.objective_by_name.name": "policy",
    "latent.latent_net.name": "net",
    "training.pick_device.name": "device",
    "exit_training.difficulty_experiment.name": "data set",
    "latent_experiments.pictures.name": "data set|name",
    "training.asset.name": "stored results|name",
    "training.shipped.what": "what|installation",
}


def text(v):
    return isinstance(v, str)


def anything(v):
    return True


def infinite(v):
    return v == inf


# values that mean something, and what: "module.name.parameter" or ".parameter" of all -> (which, meaning)
ALLOWED = {
    ".seed": (lambda v: type(v) is int, "every whole number seeds a generator"),
    "cells.verdict.above": (lambda v: v == -inf, "no lower limit"),
    "cells.verdict.below": (infinite, "no upper limit"),
    "simulator.Device.dies": (infinite, "never"),
    "simulator.Link.bandwidth": (infinite, "no time for bytes"),
    "simulator.Aggregator.deadline": (infinite, "none"),
    "simulator.Aggregator.suspect": (infinite, "never"),
    "simulator.simulate_devices.deadline": (infinite, "none"),
    "simulator.simulate_devices.suspect": (infinite, "never"),
    "inference.budget_curve.exponent": (lambda v: type(v) is float, "any power"),
    "guarantees.LatencyController.lam": (lambda v: v in (inf, -inf), "the ceiling, the floor"),
    "simulator.joint_policy.threshold": (lambda v: v in (inf, -inf), "never, always"),
    "exit_experiments.exit_cell.data": (text, "`load` looks for it when the cell is measured"),
    "distree_experiments.distree_cell.data": (
        text,
        "`load` looks for it when the cell is measured",
    ),
    "latent_experiments.data_name.data": (text, "a part of a file's name"),
    "data.hatched.shape": (text, "the empty text: no pattern"),
    "federated.Client": (anything, "a record: check_clients judges it"),
    "federated.Update": (anything, "a record: the server judges what comes"),
    "guarantees.RiskControl": (anything, "a record that control_risk writes"),
    "latent_results.Claim": (anything, "a record: `verdict` judges its limits"),
    "simulator.Answer": (anything, "a record that the aggregator writes"),
    "training.Record": (anything, "a record: load_record judges what was stored"),
    "cli.Option": (anything, "a row of the table of settings"),
    "exit_experiments.to_16_bits.head": (text, "free text"),
    "exit_experiments.from_16_bits.head": (text, "free text"),
    "cells.stored_record.name": (text, "a file that is not there is made by the command"),
    "cells.stored_record.command": (text, "free text"),
    "cells.publish.name": (text, "without assets nothing is published"),
    "latent_results.stored.data": (text, "a file that is not there is made by the command"),
    "distree_experiments.stored.name": (text, "a file that is not there is made by the command"),
    "distree_experiments.stored.data": (text, "a file that is not there is made by the command"),
    "report.figure_html.name": (text, "free text"),
    "widgets.frames_figure.prefix": (text, "free text"),
    "widgets.frames_figure.suffix": (text, "free text"),
    "fedmd.Party.id": (anything, "a record"),
    "cells.json_or_text.text": (text, "free text"),
    "cli.near.word": (anything, "a word for the message"),
    "training.by_name.what": (anything, "a word for the message"),
    "inference.plot_policies.unit": (text, "free text"),
    "widgets.Table.caption": (text, "free text"),
    "widgets.Control.label": (text, "free text"),
    "widgets.ExitExplorer.score": (text, "free text"),
    "widgets.ExitExplorer.unit": (text, "free text"),
    ".title": (text, "free text"),
    "training.figure.x": (text, "free text"),
    "training.figure.y": (text, "free text"),
    "data.hatched.ink": (text, "a colour is handed to the browser"),
    "data.hatched.colour": (text, "a colour is handed to the browser"),
    "inference.read_thresholds.name": (anything, "a word for the message, written by a programmer"),
} | {
    f"checks.{f}.{k}": (anything, "a word for the message, written by a programmer")
    for f in ("check", "number", "whole", "choice", "flag", "finite")
    for k in ("name", "allowed")
    if k == "name" or f == "check"
}

# faults that are still there: "module.name.parameter" -> reason
KNOWN = {"cli.job_steps.kind": "any other kind counts as a run"}


def allowed(name, param, value):
    return any(
        test(value)
        for k in (f"{name}.{param}", f".{param}", name)
        if k in ALLOWED
        for test in ALLOWED[k][:1]
    )


class Hang(BaseException):
    "A call took longer than HANG seconds."


def on_alarm(*_):
    raise Hang


def fault(name, param, value):
    "What is wrong with the answer to `value`, in words; None where it is as it should be."
    kw, words = CALLS[name]() | {param: value}, WORDS.get(f"{name}.{param}", param)
    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            EXPORTED[name](**kw)
    except Hang:
        return "hangs"
    except ERRORS as e:
        signal.setitimer(signal.ITIMER_REAL, 0)
        last = traceback.extract_tb(e.__traceback__)[-1]
        said = str(e)
        if "/darkdistill_nb/" not in last.filename or "raise" not in last.line:
            return f"deep inside, {type(e).__name__}: {said[:90]}"
        if "\n" in said.strip() or not re.search(rf"\b{words}\b", said):
            return f"a message without the name: {said[:90]}"
        return None
    except Exception as e:
        return f"deep inside, {type(e).__name__}: {str(e)[:90]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return "accepted"


@pytest.mark.parametrize("name", CALLS)
def test_the_valid_call_works(name, capsys):
    EXPORTED[name](**CALLS[name]())


COUNT = [0]  # examples drawn


@pytest.mark.parametrize(("name", "param"), [p for p in PARAMS if ".".join(p) not in KNOWN])
@settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=12,
    suppress_health_check=list(HealthCheck),
)
@given(draw=st.data())
def test_hostile(name, param, draw):
    p = scalars(name)[param]
    value = draw.draw(HOSTILE[p.annotation], label=f"{name}({param}=...)")
    assume(not (value is None and p.default is None))
    COUNT[0] += 1
    wrong = fault(name, param, value)
    if wrong == "accepted" and allowed(name, param, value):
        return
    assert wrong is None, f"{name}({param}={value!r}): {wrong}"


@pytest.mark.parametrize("key", KNOWN)
def test_known_faults_are_still_there(key):
    "If this fails, the fault is gone: take it out of KNOWN."
    name, param = key.rsplit(".", 1)
    values = [nan, inf, 1.5, "nonsense", None, 2, -5, [], 1j]
    assert any(fault(name, param, v) for v in values), key


def test_every_exported_callable_has_a_call_or_is_listed_as_missing():
    missing = {f"{m}.{k}" for m, *ks in (line.split() for line in MISSING.splitlines()) for k in ks}
    assert not missing & set(CALLS), "has a call now: take it out of MISSING"
    assert not missing - set(EXPORTED), "is no longer exported: take it out of MISSING"
    assert not set(EXPORTED) - set(CALLS) - missing, "new: give it a call in hostile_calls.py"
    assert not set(CALLS) - set(EXPORTED)
    assert len(CALLS) >= LEAST[0] and len(PARAMS) >= LEAST[1]
    used = set(ALLOWED) | set(WORDS) | set(KNOWN)
    known = {".".join(p) for p in PARAMS} | set(CALLS) | {"." + k for _, k in PARAMS}
    assert used <= known, f"no such parameter: {used - known}"


# exported, without a call here: this list only shrinks
MISSING = """\
bench torchdistill_job distill_jobs bench_distill stream_job exit_jobs exit_rows
bench bench_exits main
cells cell_file run_stored of_file short_name run_command run_grid kept
cli read_toml Experiment run_job run_jobs run_experiment resume_experiment UsageError
cli Parser add_run_options tutorials main
compat operator_library operators_load declare_operators ensure_torchvision
data read_npz DownloadError plot_clients
distree_experiments image_parts is_vit teacher_net distree_teacher image_digests
distree_experiments teacher_answers split_filters new_system train_system save_answers
distree_experiments load_answers joint_accuracy answers_file run_system keep_system
distree_experiments load_system centred rule_pairs measure_policies measure_failures
distree_experiments rounded run_distree value_of way_gain over_mixture compare_rules
distree_experiments rule_table check_goals plot_branches plot_systems bill_table
distree_experiments plot_sensitivity plot_failures made_on failure_cost main
distributed Teacher partition_report SystemAnswers
early_exit ClassToken take_rows pack unpack ScaleStage TokenStem token_features
exit_experiments new_net train_net answers keep_trained load_trained train_trained measure
exit_experiments pays gains gain_table plot_pays main
exit_training sgd_step compare_exits difficulty_cell learning_rates by_rate rate_table
exit_training rate_claim
features MethodLoss
federated block_average trained_state Run save_state load_state evaluate play_round
fedmd consensus
generator frozen
guarantees grid_losses
inference Score score_by_name
latent ClientTask match_shape
latent_experiments train_teacher teacher_file latent_teacher train_cell run_cell run_cells
latent_experiments save_experiment tune best_hyper chosen_hyper sweep_gamma sweep_n sweep_l
latent_experiments sweep_transfer compare latent_space differences plot_sweep
latent_experiments plot_differences check_claims claims_table comparison_table trend slopes
latent_experiments main
latent_results best_value step_differences judge verdict_table
lora lora_state merge_lora
process forgiving_console
report measure_run describe summary table_cells alone_rows summary_table accuracy_figure
report cost_figure clients_figure mean_effective_classes difficulty_figure reported_figure
report alone_figure traffic_figure in_words write_report differing compare_table
report write_compare
runner onednn_route PackedLinear FusedBlock FusedStem FusedExit fuse Outcome export_onnx
runner OnnxRunner
scale_out ray_cluster Seen RaySystem
simulator fixed_policy local_policy Outcomes
system_policies mac_shares SystemPolicy policy_by_name align_exits system_losses
training evaluating start_training write_atomic save_tensors save_record read_json
training load_record check_record fingerprint fingerprints check_fingerprints
widgets ExitModel picture_uri live_missing
"""
