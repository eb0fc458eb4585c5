"""Make this folder from larger ones: python tests/reference/pack.py FOLDER [FOLDER ...]

Takes the cases named here from the folders given, leaves out what LEAVE_OUT names, halves the times of the per-pixel
schedules, and compresses with bzip2, which numpy reads and which is a fifth smaller than its own compression. The
arrays that stay are bit for bit those of the source.
"""

import io
import re
import sys
import zipfile
from pathlib import Path

import numpy as np

CASES = (
    "layers",
    "score_unet_vdm_embd32",
    "score_unet_per_pixel_small",
    "encoder_unet_small",
    "encoder_unet_gaussian_small",
    "encoder_cnn_small",
    "schedule_poly_fixedend",
    "schedule_nnet_multivariate",
    "schedule_linear_multivariate",
    "schedule_nnet_scalar",
    "schedule_scalar",
    "schedule_linear",
    "latents",
    "mulan_epsilon_loss",
    "mulan_velocity_loss_small",
    "vdm_loss",
    "idode_loss_small",
    "mulan_ancestral_small",
    "vdm_ancestral_small",
    "optimizer",
    "idode_ode_drift",
    "mulan_ode_likelihood",
)
LEAVE_OUT = (
    r"layers\.npz/[a-z]+/resnet_block_wide/.*"  # of the shape of resnet_block_per_pixel
    r"|idode_ode_drift\.npz/(in|draw|out)/g[02]/.*"  # one of three places
    r"|mulan_ode_likelihood\.npz/(draw|out)/(epsilon|velocity_is3)/.*"  # one of three variants
)
EVERY_OTHER = r"schedule_(poly|nnet_multi).*/(in/t|out/gamma|out/dgamma_dt)"


def pack(source: Path, target: Path) -> None:
    """One case, read and written again."""
    with np.load(source, allow_pickle=False) as arrays, zipfile.ZipFile(target, "w", zipfile.ZIP_BZIP2) as archive:
        for key in sorted(arrays.files):
            name = f"{source.name}/{key}"
            if re.fullmatch(LEAVE_OUT, name):
                continue
            array = arrays[key][::2] if re.fullmatch(EVERY_OTHER, name) else arrays[key]
            content = io.BytesIO()
            np.save(content, array, allow_pickle=False)
            # A fixed date, so that the same arrays give the same file.
            entry = zipfile.ZipInfo(f"{key}.npy", (1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, content.getvalue(), zipfile.ZIP_BZIP2)


if __name__ == "__main__":
    here = Path(__file__).parent
    for case in CASES:
        (source,) = (path for folder in sys.argv[1:] if (path := Path(folder) / f"{case}.npz").exists())
        pack(source, here / source.name)
        print(f"{source.name:36} {(here / source.name).stat().st_size:9,}")
    print(f"{sum(path.stat().st_size for path in here.glob('*.npz')):46,}")
