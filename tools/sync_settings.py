#!/usr/bin/env python3
"""Generate pyproject.toml, `__version__` and the install line for Colab from settings.ini.   sync_settings.py [--check]

nbdev 3 reads pyproject.toml only. `nbdev-migrate-config` turns settings.ini into one, but loses sub-packages,
extras other than `dev`, package data and some `[tool.nbdev]` keys; this script puts them back.
With --check nothing is written and the exit code is 1 if a generated file differs."""

import configparser, difflib, re, shutil, subprocess, sys, tempfile, tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# Generated from settings.ini by `python tools/sync_settings.py`; edits here are lost.\n"
LIST_KEYS = (
    "allowed_metadata_keys",
    "allowed_cell_metadata_keys",
    "allowed_out_metadata_keys",
    "doc_procs",
    "export_procs",
)
PLAIN_KEYS = ("cell_timeout", "exec_profile", "test_setup", "tst_flags")


def migrate(root):
    "The pyproject text that `nbdev-migrate-config` makes of `root`/settings.ini, run in a temporary folder."
    exe = (
        shutil.which("nbdev-migrate-config", path=str(Path(sys.executable).parent))
        or "nbdev-migrate-config"
    )
    with tempfile.TemporaryDirectory() as tmp:
        shutil.copy(root / "settings.ini", tmp)
        subprocess.run([exe, "--path", tmp], check=True, stdout=subprocess.DEVNULL)
        return (Path(tmp) / "pyproject.toml").read_text(encoding="utf-8")


def array(items):
    return "[" + ", ".join(f'"{o}"' for o in items) + "]"


def scalar(v):
    return (
        v.lower() if v.lower() in ("true", "false") else v if re.fullmatch(r"\d+", v) else f'"{v}"'
    )


def packages(root, lib):
    "Names of the package and of its sub-packages: every folder with an `__init__.py`."
    found = [p.parent.relative_to(root) for p in (root / lib).rglob("__init__.py")]
    return [lib, *sorted(".".join(p.parts) for p in found if len(p.parts) > 1)]


def resources(text):
    "The lines `folder: patterns` of the key `resources`, as {folder: [pattern, ...]}."
    rows = [line.partition(":") for line in text.splitlines() if line.strip()]
    return {folder.strip(): patterns.split() for folder, _, patterns in rows}


def setuptools_blocks(s, root, lib):
    """What goes into the package, as lines of [tool.setuptools...].

    A folder of `resources` becomes the data of a package without code, `LIB._FOLDER`, so that it is installed inside the
    package and not at a place that differs from system to system (Debian, Colab, `--user`, `--target`)."""
    data = resources(s.get("resources", ""))
    names = {folder: f"{lib}._{folder}" for folder in data}
    out = ["[tool.setuptools]", f"packages = {array([*packages(root, lib), *names.values()])}"]
    out += ["include-package-data = false", ""]
    if data:
        out += ["[tool.setuptools.package-dir]"]
        out += [*(f'"{name}" = "{folder}"' for folder, name in names.items()), ""]
    out += ["[tool.setuptools.package-data]"]
    if s.get("package_data"):
        out += [f"{lib} = {array(s['package_data'].split())}"]
    return out + [
        *(f'"{names[folder]}" = {array(patterns)}' for folder, patterns in data.items()),
        "",
    ]


def settings(root=ROOT):
    "The keys of settings.ini."
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(root / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def docs_home(s):
    "Where the documentation is read."
    return f"https://{s['user']}.github.io/{s['repo']}/"


def install_source(s):
    "What `pip install` is given where the package is missing; None where the settings do not say."
    return s["install_source"].format(**s) if "install_source" in s else None


def install_line(root):
    "nbs/index.ipynb with today's source in its line `%pip install`, as {path: text}."
    path, source = root / "nbs/index.ipynb", install_source(settings(root))
    if not (source and path.exists()):
        return {}
    old = path.read_text(encoding="utf-8")
    return {path: re.sub(r"(%pip install -q )[^\s\\]+", lambda m: m[1] + source, old)}


def pyproject(root):
    "The complete text of pyproject.toml."
    s = settings(root)
    lib = s["lib_name"]
    txt = migrate(root).replace(', email = ""', "")
    txt = re.sub(r"\n*\[tool\.setuptools\.packages\.find\]\n.*\n", "\n", txt)
    txt = re.sub(r"\n*\[project.optional-dependencies\]\ndev = .*\n", "\n", txt)
    extras = {
        k.removesuffix("_requirements"): v.split()
        for k, v in s.items()
        if k.endswith("_requirements") and k != "pip_requirements"
    }
    blocks = [
        "[project.optional-dependencies]",
        *(f"{k} = {array(v)}" for k, v in extras.items()),
        "",
    ]
    blocks += setuptools_blocks(s, root, lib)
    txt = txt.replace("[tool.nbdev]", "\n".join(blocks) + "\n[tool.nbdev]")
    nbdev = [f"{k} = {array(s[k].split())}" for k in LIST_KEYS if k in s] + [
        f"{k} = {scalar(s[k])}" for k in PLAIN_KEYS if k in s
    ]
    txt = txt.rstrip() + "\n" + "\n".join(nbdev) + "\n"
    tomllib.loads(txt)
    return HEADER + re.sub(r"\n{3,}", "\n\n", txt), s["version"], lib


def wanted(root):
    "Every generated file of `root` as {path: text}."
    text, version, lib = pyproject(root)
    init = root / lib / "__init__.py"
    old = init.read_text(encoding="utf-8") if init.exists() else ""
    new, n = re.subn(r"^__version__\s*=.*$", f'__version__ = "{version}"', old, flags=re.M)
    return {
        root / "pyproject.toml": text,
        init: new if n else f'{old}\n__version__ = "{version}"\n'.lstrip(),
        **install_line(root),
    }


def main(argv, root=ROOT):
    check, stale = "--check" in argv, []
    for path, text in wanted(root).items():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old == text:
            continue
        stale.append(path)
        if check:
            sys.stdout.writelines(
                difflib.unified_diff(
                    old.splitlines(True),
                    text.splitlines(True),
                    f"{path} (now)",
                    f"{path} (from settings.ini)",
                )
            )
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    names = ", ".join(str(p.relative_to(root)) for p in stale)
    if check and stale:
        print(f"out of step with settings.ini: {names}; run `python tools/sync_settings.py`")
    elif stale:
        print(f"wrote {names}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
