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
LEAST = (309, 626)  # callables, parameters; they only grow
ERRORS = (ValueError, TypeError, FileNotFoundError, FloatingPointError)

EXPORTED, PLAIN = {}, (int, float, str, bool)
for info in pkgutil.walk_packages(darkdistill_nb.__path__, "darkdistill_nb."):
    if info.ispkg or info.name.endswith("__main__"):
        continue
    module = importlib.import_module(info.name)
    for key in getattr(module, "__all__", []):
        if callable(getattr(module, key)):
            EXPORTED[key] = getattr(module, key)  # a name has one meaning: test_repo.py


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
    "student_net.arch": "arch|name",
    "build_net.arch": "arch|name",
    "three_parts.name": "data set",
    "objective_by_name.name": "objective",
    "option_of.name": "setting",
    "latent_net.name": "net",
    "pick_device.name": "device",
    "difficulty_experiment.name": "data set",
    "images.name": "data set|name",
    "asset.name": "stored results|name",
    "shipped.what": "what|installation",
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
    "verdict.above": (lambda v: v == -inf, "no lower limit"),
    "verdict.below": (infinite, "no upper limit"),
    "Device.dies": (infinite, "never"),
    "Link.bandwidth": (infinite, "no time for bytes"),
    "Aggregator.deadline": (infinite, "none"),
    "Aggregator.suspect": (infinite, "never"),
    "simulate_devices.deadline": (infinite, "none"),
    "simulate_devices.suspect": (infinite, "never"),
    "budget_curve.exponent": (lambda v: type(v) is float, "any power"),
    "LatencyController.lam": (lambda v: v in (inf, -inf), "the ceiling, the floor"),
    "joint_policy.threshold": (lambda v: v in (inf, -inf), "never, always"),
    "exit_cell.data": (text, "`load` looks for it when the cell is measured"),
    "distree_cell.data": (text, "`load` looks for it when the cell is measured"),
    "data_name.data": (text, "a part of a file's name"),
    "hatched.shape": (text, "the empty text: no pattern"),
    "Client": (anything, "a record: check_clients judges it"),
    "Update": (anything, "a record: the server judges what comes"),
    "RiskControl": (anything, "a record that control_risk writes"),
    "Claim": (anything, "a record: `verdict` judges its limits"),
    "PaperClaim": (anything, "a record: `verdict` judges its limits"),
    "Answer": (anything, "a record that the aggregator writes"),
    "Stage": (anything, "a record that shapes_stage makes"),
    "Record": (anything, "a record: load_record judges what was stored"),
    "Option": (anything, "a row of the table of settings"),
    "Finding": (anything, "a record that findings writes"),
    "defaults_for.data": (text, "`load` looks for it later"),
    "defaults_for.arch": (text, "`build_net` looks for it later"),
    "to_16_bits.head": (text, "free text"),
    "from_16_bits.head": (text, "free text"),
    "stored_record.name": (text, "a file that is not there is made by the command"),
    "stored_record.command": (text, "free text"),
    "publish.name": (text, "without assets nothing is published"),
    "latent_record.data": (text, "a file that is not there is made by the command"),
    "distree_record.name": (text, "a file that is not there is made by the command"),
    "distree_record.data": (text, "a file that is not there is made by the command"),
    "figure_html.name": (text, "free text"),
    "Party.id": (anything, "a record"),
    "json_or_text.text": (text, "free text"),
    "near.word": (anything, "a word for the message"),
    "Registry.what": (anything, "a word for the message, written by a programmer"),
    "Keyword": (anything, "a record that keywords_of writes"),
    "job_name.kind": (text, "any other kind counts as a run"),
    "plot_policies.unit": (text, "free text"),
    "Table.caption": (text, "free text"),
    "as_numbers.hint": (text, "free text"),
    "agree.hint": (text, "free text"),
    "Lab.name": (text, "free text"),
    "Lab.version": (text, "free text"),
    "Row.paper": (text, "free text"),
    "Row.claim": (text, "free text"),
    "Row.published": (text, "free text"),
    "Row.source": (text, "free text"),
    "Row.ours": (text, "free text"),
    "ExitExplorer.score": (text, "free text"),
    "ExitExplorer.unit": (text, "free text"),
    ".title": (text, "free text"),
    "figure.x": (text, "free text"),
    "figure.y": (text, "free text"),
    "hatched.ink": (text, "a colour is handed to the browser"),
    "hatched.colour": (text, "a colour is handed to the browser"),
    "read_thresholds.name": (anything, "a word for the message, written by a programmer"),
} | {
    f"{f}.{k}": (anything, "a word for the message, written by a programmer")
    for f in ("check", "number", "whole", "choice", "flag", "finite")
    for k in ("name", "allowed")
    if k == "name" or f == "check"
}

# faults that are still there: "module.name.parameter" -> reason
KNOWN = {"job_steps.kind": "any other kind counts as a run"}


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
    missing = set(MISSING.split())
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
torchdistill_job distill_jobs bench_distill bench_browser stream_job exit_jobs exit_rows
bench_exits main
cell_file run_stored of_file short_name run_command run_grid kept
read_toml Experiment run_job run_jobs run_experiment resume_experiment UsageError
Parser add_run_options tutorials main
operator_library operators_load declare_operators ensure_torchvision
read_npz DownloadError plot_clients
image_parts is_vit teacher_net distree_teacher image_digests
teacher_answers split_filters new_system train_system save_answers
load_answers joint_accuracy answers_file run_system keep_system
load_system centred rule_pairs measure_policies measure_failures
rounded run_distree value_of way_gain over_mixture compare_rules
rule_table check_goals plot_branches plot_systems system_cost_table
plot_sensitivity plot_failures made_on failure_cost main
Teacher partition_report SystemAnswers
ClassToken take_rows pack unpack ScaleStage TokenStem token_features
new_net train_net answers keep_trained load_trained train_trained measure
tier_models measure_stage measure_cell run_stage
pays gains gain_table plot_pays main
sgd_step compare_exits difficulty_cell learning_rates by_rate rate_table
rate_claim
MethodLoss
block_average trained_state Run save_state load_state evaluate play_round
consensus
frozen
grid_losses
Score score_by_name
ClientTask match_shape
train_teacher teacher_file latent_teacher train_cell run_cell run_cells
save_experiment tune best_hyper chosen_hyper sweep_gamma sweep_n sweep_l
sweep_transfer compare latent_space differences plot_sweep
plot_differences check_claims claims_table comparison_table trend slopes
main
best_value step_differences judge verdict_table
lora_state merge_lora
forgiving_console
measure_run describe summary table_cells alone_rows summary_table accuracy_figure
cost_figure clients_figure mean_effective_classes difficulty_figure reported_figure
alone_figure traffic_figure in_words write_report differing compare_table
write_compare
onednn_route PackedLinear FusedBlock FusedStem FusedExit fuse Outcome export_onnx
OnnxRunner
ray_cluster Seen RaySystem
fixed_policy local_policy Outcomes
mac_shares SystemPolicy policy_by_name align_exits system_losses
public_names
evaluating start_training write_atomic save_tensors save_record read_json
load_record check_record fingerprint fingerprints check_fingerprints
ExitModel image_uri live_missing
"""
