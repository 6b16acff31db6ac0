"""The commands of compose.yaml run as processes here, each in a folder that holds what it may see."""

import settings_here  # noqa: F401
import shlex, shutil, sys
from pathlib import Path
import yaml
from darkdistill_nb.core.records import load_record
from darkdistill_nb.experiments import machines
from darkdistill_nb.experiments.machines import Program, free_port

ROOT = Path(__file__).resolve().parent.parent.parent
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]
KEYS = "./flower/keys"  # on the host


class Machine:
    "What stands for a container: a folder with the files that its volumes show, and its command."

    def __init__(self, name, folder, keys, port):
        self.name, self.service = name, SERVICES[name]
        own = folder / name
        for volume in self.service["volumes"]:
            host, inside = volume.removesuffix(":ro").split(":")
            there = keys / Path(host).relative_to(KEYS)
            if there.is_file():
                target = own / Path(inside).relative_to("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(there, target)
            else:
                own.mkdir(parents=True, exist_ok=True)
                (own / Path(inside).relative_to("/")).symlink_to(there)
        other = {"0.0.0.0": "127.0.0.1", "9092": str(port), "server:9092": f"localhost:{port}"}
        here = lambda w: str(own / w[1:]) if w.startswith("/") else other.get(w, w)
        self.words = [here(w) for w in shlex.split(self.service["command"])]
        self.log, self.home = own / "said.log", own / "home"

    def start(self):
        assert self.words[:2] == ["darkdistill", "flower"]
        module = [sys.executable, "-m", "darkdistill_nb", *self.words[1:]]
        self.program = Program(module, self.log, self.home)
        return self

    def end(self, seconds=400):
        "Wait for its end."
        assert self.program.process.wait(seconds) == 0, self.log.read_text()
        return self.log.read_text()


def test_a_node_sees_one_private_key_only():
    for name, service in SERVICES.items():
        if name.startswith("node"):
            seen = [v.split(":")[1] for v in service["volumes"]]
            assert seen == ["/node/ca.crt", "/node/federation.json", f"/node/{name}.key"]
            assert all(v.endswith(":ro") for v in service["volumes"])


def test_the_services_train_together(tmp_path):
    keys, port = tmp_path / "keys", free_port()
    keys.mkdir()
    make = lambda name: Machine(name, tmp_path / "machines", keys, port)
    make("keys").start().end(60)
    running = [make("server").start()]
    machines._until(lambda: "serving on" in running[0].log.read_text(), running[0].program, 90)
    try:
        for name in SERVICES:
            if SERVICES[name].get("depends_on") == ["server"]:
                running.append(make(name).start())
        job = make("job")
        running.append(job)
        job.words.remove("rounds=2")
        job.words += ["data=digits", "clients=4", "rounds=1", "participation=1.0"]  # it is --set
        said = job.start().end()
        assert "report:" in said and (keys / "run/report.html").is_file()
        [run] = load_record(keys / "run").runs
        assert [row["left_out"] for row in run["rounds"]] == [{}]
    finally:
        for machine in running:  # as `docker compose down` does: SIGTERM, then wait
            machine.program.kill(hard=False)
        codes = [machine.program.process.wait(60) for machine in running]
    assert codes == [130, 130, 130, 0]
    left = [p for m in running for p in sessions_of(m)]
    assert left == []


def sessions_of(machine):
    "Command lines of what still runs with the machine's folder in its command."
    own = str(machine.home.parent).encode()
    found = []
    for p in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = p.read_bytes()
        except OSError:
            continue
        found += [text] if own in text else []
    return found


PAGE = (ROOT / "docs/pages/howto/machines.md").read_text(encoding="utf-8")


def test_flowers_messages_on_the_page_are_flowers():
    from flwr.supercore.error.base import ApiErrorCode

    codes = {str(int(c)) for c in ApiErrorCode}
    assert {"2001", "2004"} <= codes
