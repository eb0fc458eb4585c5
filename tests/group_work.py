"""What one of several processes does in tests/test_group.py: all shared work on a small model, its results in a file.

python tests/group_work.py RUN OUT [DEVICE]     with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, or none of them
"""

import sys
from pathlib import Path

import numpy as np

from nelbo import checkpoints, evaluation, fid, sampling
from nelbo.group import join


def work(run: Path, out: Path, device: str = "cpu") -> dict[str, np.ndarray]:
    """Figures by name, from every verb but train; ``out`` is a folder for what is written."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str, settings: evaluation.Settings) -> None:
        result = evaluation.evaluate(run, settings, out=out, device=device).result
        found[name] = np.array([result.mean, result.standard_error, result.draws_error])
        found[f"{name}-images"] = result.per_image
        for term, values in result.per_image_terms.items():
            found[f"{name}-{term}"] = values

    keep("bound", evaluation.Settings(images=19, times=3, batch=8))  # 114 rows: the last batch has two
    keep("dense", evaluation.Settings(images=3, times=32, shifts=1, batch=16))
    # A pair chooses its own steps, other numbers of them for other images.
    keep("ode", evaluation.Settings("ode", images=5, rtol=0.03, atol=0.03, solver="bosh3", batch=3))
    keep("ode-3", evaluation.Settings("ode", images=2, samples=3, rtol=0.03, atol=0.03, solver="bosh3", batch=4))
    model = checkpoints.load_model(run, device=device)
    drawn = sampling.Settings(count=11, steps=4, batch=4)
    sampling.sample_to_files(model, out / "some", drawn)
    sampling.sample_to_shards(model, out / "shards", sampling.Settings(count=11, steps=4, batch=2, shard=4), {})
    measured = fid.evaluate(
        run, fid.Settings(extractor="random", count=40, steps=3, splits=2, batch=8), device=device, say=lambda s: None
    )
    score = measured.inception_score or (0.0, 0.0)
    found["fid"] = np.array([measured.frechet.value, measured.frechet.standard_error, *score])
    return found


def main() -> None:
    """Each process keeps what it found."""
    run, out, device = Path(sys.argv[1]), Path(sys.argv[2]), (*sys.argv[3:], "cpu")[0]
    group = join(device)
    if group.main:
        out.mkdir()
    group.wait()
    found = work(run, out, device)
    np.savez(out / f"found-{group.rank}.npz", **found)  # type: ignore[arg-type]
    group.close()


if __name__ == "__main__":
    main()
