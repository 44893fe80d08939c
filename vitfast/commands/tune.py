"""The command `vitfast tune`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vitfast.check.case import DTYPES
from vitfast.check.compare import DeviceLost
from vitfast.check.tune import BUDGET_S, tune
from vitfast.choose import tuning_cache
from vitfast.measure import device as devices
from vitfast.timm_names.variants import config_for


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where a kernel was wrong or nothing could be kept, 2 for wrong use."""
    told = _parser().parse_args(argv)
    try:
        device = devices.device_named(told.device)
        if not told.budget > 0:
            raise ValueError(f"--budget must be more than 0, got {told.budget}")
        configs = [config_for(name, img_size=told.image_size) for name in told.model]
        report = tune(
            configs, told.batch, DTYPES[told.dtype], told.training, device=device, prepared=told.prepared,
            budget_s=told.budget,
        )  # fmt: skip
    except (ValueError, TypeError, NotImplementedError) as problem:
        print(f"vitfast tune: {problem}", file=sys.stderr)
        return 2
    except DeviceLost as problem:
        print(f"vitfast tune: the device was lost {problem}; what was measured before is kept", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vitfast tune: stopped; what was measured is kept", file=sys.stderr)
        return 130
    print(report)
    print(f"kept in {report.path}" if report.path else "nothing was kept")
    return int(report.path is None or any(row.wrong for row in report.rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vitfast tune",
        description="Time this package's kernels against stock PyTorch operators on this GPU, for the shapes of some "
        "models, and keep for each shape what is faster. Nothing else should use the GPU meanwhile.",
        epilog=f"The file is in {tuning_cache.folder()} ($VITFAST_CACHE_DIR names another folder) and holds for this "
        "card, driver, torch, triton, vitfast and source of its kernels only.",
    )
    add = parser.add_argument
    add("model", nargs="+", metavar="MODEL", help="timm's names, see `vitfast models`")
    add("--batch", nargs="+", type=int, default=[1], metavar="N", help="images (default: 1)")
    add("--dtype", choices=DTYPES, default="bf16", help="what the model computes in (default: %(default)s)")
    add("--training", action="store_true", help="also the backward")
    add("--prepared", action="store_true", help="also what vitfast.prepare makes of the models")
    add("--image-size", type=int, metavar="PIXELS", help="another size than the models' own")
    add("--device", default="cuda", help="cuda, cuda:1 ... (default: %(default)s)")
    add("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="for all (default: %(default).0f)")
    return parser
