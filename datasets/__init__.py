"""Datasets of recorded episodes: `scd_robot.datasets`.

This folder is installed inside `scd_robot`. Python started in the checkout also finds it under the bare name
`datasets`, which belongs to Hugging Face; it then steps aside for that package.
"""

if __name__ == "datasets":
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _checkout = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec("datasets", [p for p in sys.path if Path(p).resolve() != _checkout])
    if _spec is None or _spec.loader is None:
        raise ModuleNotFoundError(
            f"no package 'datasets' is installed; the folder {_checkout / 'datasets'} is imported as "
            "'scd_robot.datasets', and Hugging Face's package comes with 'pip install datasets'",
            name="datasets",
        )
    # The import system returns what sys.modules holds after this file has run.
    sys.modules["datasets"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["datasets"])
else:
    from scd_robot.datasets.open import open_dataset
    from scd_robot.datasets.schema import ACTION, EXECUTED_ACTION, POSITION, PRESENT, EpisodeDataset
    from scd_robot.datasets.windows import SegmentBatch, SegmentIndex, split_episodes
    from scd_robot.datasets.zarr.writer import ZarrWriter

    __all__ = [
        "ACTION",
        "EXECUTED_ACTION",
        "POSITION",
        "PRESENT",
        "EpisodeDataset",
        "SegmentBatch",
        "SegmentIndex",
        "ZarrWriter",
        "open_dataset",
        "split_episodes",
    ]
