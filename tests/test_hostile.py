"""Hostile arguments for every scalar parameter: an error of one sentence that names the argument, or a documented meaning.

No accepted nonsense, no error from deep inside, no hang. The calls are in hostile_calls.py."""

import contextlib, importlib, inspect, math, pkgutil, re, signal, sys, traceback, warnings
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
import darkdistill_nb
from conftest import LONG
import hostile_calls, hostile_experiments
from hostile_experiments import LAZY

CALLS = hostile_calls.CALLS | hostile_experiments.CALLS
pytestmark = pytest.mark.usefixtures("one_thread")
nan, inf = math.nan, math.inf
HANG = 20  # s of the processor for one call, which a busy machine does not stretch
sys.setrecursionlimit(10_000)  # hypothesis 6.170: settings of one case stand on those of the last
LEAST = (528, 922)  # callables, parameters; they only grow
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
    "start_server.host": "host|folder",
    "start_node.server": "server|folder",
    "run_job.kind": "method",
    "save_experiment.data": "data|results",
    "run_distree.name": "experiment",
    "pays.data": "data set|name|data",
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
    "Place": (anything, "a record that a post makes"),
    "Here": (anything, "parts of a run that `simulate` has judged"),
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
    "train_or_load.name": (text, "what is not stored is trained"),
    "train_or_load.lesson": (text, "a word of the record"),
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
    "clients_figure.seed": (lambda v: v == "1", "a seed as the record writes it"),
    "chosen_hyper.data": (text, "a data set without tuned settings has those of `HYPER`"),
    "run_experiment.command": (text, "free text"),
    "Seen": (anything, "a record that `serve` writes"),
    "Outcomes": (anything, "a record that the simulator writes"),
    "Run": (anything, "a record that simulate writes"),
    "job_name.kind": (text, "any other kind counts as a run"),
    "plot_policies.unit": (text, "free text"),
    "Table.caption": (text, "free text"),
    "as_numbers.hint": (text, "free text"),
    "agree.hint": (text, "free text"),
    "Lab.name": (text, "free text"),
    "Submission": (anything, "a record that find_submissions writes"),
    "Part": (anything, "a record that read_parts writes"),
    "Mark": (anything, "a record that grade_course writes"),
    "advice.said": (text, "free text"),
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
    "A call computed for more than HANG seconds, or waited for LONG."


def on_alarm(*_):
    raise Hang


@contextlib.contextmanager
def no_hang():
    "Raises `Hang` in a call that does not end."
    before = [signal.signal(s, on_alarm) for s in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, HANG)
    signal.setitimer(signal.ITIMER_REAL, LONG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for s, old in zip((signal.SIGPROF, signal.SIGALRM), before):
            signal.signal(s, old)


def fault(name, param, value):
    "What is wrong with the answer to `value`, in words; None where it is as it should be."
    kw, words = CALLS[name]() | {param: value}, WORDS.get(f"{name}.{param}", param)
    try:
        with no_hang(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = EXPORTED[name](**kw)
            if isinstance(made, contextlib._GeneratorContextManager):
                with made:  # it looks at its arguments when it is entered
                    pass
    except Hang:
        return "hangs"
    except ERRORS as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        said = str(e)
        if "/darkdistill_nb/" not in last.filename or "raise" not in last.line:
            return f"deep inside, {type(e).__name__}: {said[:90]}"
        if "\n" in said.strip() or not re.search(rf"\b{words}\b", said):
            return f"a message without the name: {said[:90]}"
        return None
    except Exception as e:
        return f"deep inside, {type(e).__name__}: {str(e)[:90]}"
    return "accepted"


@pytest.mark.parametrize("name", [c for c in CALLS if c not in LAZY])
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


def test_every_exported_callable_with_a_plain_parameter_has_a_call():
    "One without a number, a text or a flag among its parameters has nothing to be asked here; the cell after it tries it."
    hostile_calls_of = {name for name in EXPORTED if scalars(name)}
    assert not hostile_calls_of - set(CALLS), "new: give it a call in hostile_calls.py"
    assert not set(CALLS) - set(EXPORTED) and set(LAZY) <= set(CALLS)
    assert len(CALLS) >= LEAST[0] and len(PARAMS) >= LEAST[1]
    used = set(ALLOWED) | set(WORDS) | set(KNOWN)
    known = {".".join(p) for p in PARAMS} | set(CALLS) | {"." + k for _, k in PARAMS}
    assert used <= known, f"no such parameter: {used - known}"
