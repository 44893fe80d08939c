"""The `vitfast` command: what it prints, its exit status, and that a user error never ends in a traceback."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import vitfast
from vitfast.commands.main import main
from vitfast.kernels import extension


def vitfast_process(*arguments, **kw):
    return subprocess.run([sys.executable, "-m", "vitfast", *arguments], capture_output=True, text=True, **kw)


def test_info_fails_in_a_fresh_process_or_prints_to_stderr():
    result = vitfast_process("info")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout.startswith(f"vitfast {vitfast.__version__}")
    parts = ("torch", "timm", "cpu:", "cuda:", "triton:", "extension:", "ops:", "kernels for GPUs:", "tuned on")
    for part in parts:
        assert part in result.stdout


def info_json(capsys):
    assert main(["info", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_info_json_is_not_json_or_lacks_a_part(capsys):
    info = info_json(capsys)
    assert info["vitfast"] == vitfast.__version__
    assert info["packages"]["torch"] == importlib.metadata.version("torch")
    assert info["device"]["cuda"] or info["device"]["why_no_cuda"]
    assert info["triton"]["usable"] or info["triton"]["why"]
    assert info["extension"]["built"] or info["extension"]["why"]


def test_an_op_is_missing_or_has_neither_a_kernel_nor_a_reason(capsys):
    ops = info_json(capsys)["ops"]
    assert {"patch_embed", "layer_norm", "add_layer_norm", "linear", "attention", "attention_qkv", "mlp"} <= set(ops)
    for name, devices in ops.items():
        assert set(devices) == {"cpu", "cuda"}, name
        for device, path in devices.items():
            assert path["runs_as"], (name, device)
            assert path["kernel"] or path["why_no_kernel"], (name, device)


def test_text_and_json_of_info_tell_different_things(capsys):
    ops = info_json(capsys)["ops"]
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, devices in ops.items():
        for device, path in devices.items():
            line = next(found for found in lines if found.split()[:2] == [name, device])
            assert (path["kernel"] or path["runs_as"]) in line and path["why_no_kernel"] in line


@pytest.mark.parametrize("why", ["", "the system refuses them"])
def test_info_is_silent_about_amx_that_cannot_be_used(why, capsys, monkeypatch):
    monkeypatch.setattr(extension.require(), "why_no_tiles", lambda: why)
    assert info_json(capsys)["extension"]["why_no_amx"] == why
    main(["info"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "CPU kernels" in line]
    assert line.endswith("; AMX is not usable: the system refuses them") is bool(why)


def test_models_leaves_out_a_name_or_a_reason(capsys):
    assert main(["models"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    works = [line for line in lines if "not available" not in line]
    lacking = dict(line.split(maxsplit=1) for line in lines if "not available" in line)
    assert set(works) == set(vitfast.VARIANTS) and works == sorted(works)
    assert set(lacking) == set(vitfast.UNSUPPORTED)
    assert all(vitfast.UNSUPPORTED[name] in reason for name, reason in lacking.items())
    assert last == f"{len(works)} work, {len(lacking)} do not"


def test_models_pattern_is_ignored_or_hides_what_does_not_work(capsys):
    assert main(["models", "*dinov2*"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    expected = {name for name in (*vitfast.VARIANTS, *vitfast.UNSUPPORTED) if "dinov2" in name}
    assert expected and {line.split()[0] for line in lines} == expected
    assert main(["models", "no_such_*"]) == 0
    assert capsys.readouterr().out.splitlines() == ["0 work, 0 do not"]


@pytest.mark.parametrize("pattern", [[], ["*dinov2*"]], ids=str)
def test_models_json_is_not_json_or_differs_from_the_tables(pattern, capsys):
    assert main(["models", "--json", *pattern]) == 0
    models = json.loads(capsys.readouterr().out)
    keep = lambda name: not pattern or "dinov2" in name  # noqa: E731
    assert models == {
        "works": sorted(filter(keep, vitfast.VARIANTS)),
        "missing_field": {name: vitfast.UNSUPPORTED[name] for name in sorted(vitfast.UNSUPPORTED) if keep(name)},
    }


WRONG = [[], ["nonsense"], ["info", "extra"], ["info", "--jsn"], ["models", "a", "b"], ["--json"]]


@pytest.mark.parametrize("arguments", WRONG, ids=str)
def test_wrong_use_is_accepted_or_not_explained(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert not printed.out and "usage: vitfast" in printed.err


def test_command_that_was_moved_is_not_found_again(capsys):
    """`vitfast bench` is `python -m benchmarks` in a checkout."""
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "--model", "vit_base_patch16_224"])
    assert exit_.value.code == 2 and "run `python -m benchmarks` in a checkout" in capsys.readouterr().err


def test_wrong_use_ends_in_a_traceback():
    result = vitfast_process("nonsense")
    assert result.returncode == 2 and not result.stdout
    assert "usage: vitfast" in result.stderr and "Traceback" not in result.stderr


def test_help_does_not_name_a_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("info", "models", "demo", "tune"))


def test_reader_that_stops_early_gets_a_traceback():
    """`vitfast models | head -1`: more is printed than a pipe holds, and nobody reads it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vitfast", "models", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    process.wait()
    assert "Traceback" not in error and "BrokenPipe" not in error


def test_installed_command_does_not_start():
    """The console script exists once the package is installed; a wrong entry point shows only there."""
    points = importlib.metadata.entry_points(group="console_scripts", name="vitfast")
    script = Path(sys.executable).parent / "vitfast"
    if not points or not script.exists():
        pytest.skip("vitfast is not installed, it is run from its sources")
    assert {point.value for point in points} == {"vitfast.commands.main:main"}
    result = subprocess.run([script, "models", "vit_tiny_patch16_224"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == ["vit_tiny_patch16_224", "1 work, 0 do not"]
