"""`scd train-autoencoder`, and the frames that are imagined as its latents: from a recording to pictures."""

import json
from dataclasses import replace

import numpy as np
import pytest
from frame_models import moving_square

from scd_robot.cli.main import main
from scd_robot.datasets.convert import write_zarr
from scd_robot.types import ArraySpec

SMALL = ["--updates", "2", "--channels", "8", "8", "8", "--latent-channels", "3", "--batch-size", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The moving square in pictures of 80 x 64."""
    data = moving_square(episodes=4, steps=12)
    large = data.arrays["eye"].repeat(5, axis=1).repeat(4, axis=2)
    spec = replace(data.spec, observation={"eye": ArraySpec(large.shape[1:], "uint8")})
    path = tmp_path_factory.mktemp("large") / "square.zarr"
    write_zarr(replace(data, spec=spec, arrays={**data.arrays, "eye": large}), path)
    return path


@pytest.fixture(scope="module")
def autoencoder(store):
    out = store.parent / "ae"
    arguments = ["train-autoencoder", "--dataset", str(store), "--out", str(out), *SMALL]
    assert main(arguments) == 0
    return out


def frames_run(store, autoencoder, out, *settings):
    small = ["training.max_steps=2", "training.batch_size=2", "training.segment_length=6", "training.held_out=0.25"]
    small += ["training.positions_per_segment=2", "model.width=16", "model.num_heads=2", "model.encoder_layers=1"]
    arguments = ["train", "frames_latent", "--dataset", str(store), "--out", str(out), "--set", *small, *settings]
    return [*arguments, "--threads", "1", *([] if autoencoder is None else ["--autoencoder", str(autoencoder)])]


def test_it_tells_what_it_keeps_of_held_out_episodes(autoencoder, store, tmp_path, refused, capsys):
    document = json.loads((autoencoder / "autoencoder.json").read_text())
    assert (document["camera"], document["shape"], document["dataset"]) == ("eye", [80, 64, 1], str(store))
    assert document["config"] == {"channels": [8, 8, 8], "latent_channels": 3}
    assert document["held_out"]["episodes"] == 1
    assert 0 < document["held_out"]["psnr_moving"]["reconstructed"] < document["held_out"]["psnr"]["repeated"]
    assert (autoencoder / "autoencoder.png").stat().st_size > 1000
    again = ["train-autoencoder", "--dataset", store, "--out", autoencoder, *SMALL]
    refused(again, "already holds an autoencoder; choose another --out, or --overwrite it", unchanged=[autoencoder])
    refused([*again, "--overwrite", "--camera", "nose"], "unknown camera 'nose'; valid names: eye", at_once=False)
    capsys.readouterr()
    assert main([str(a) for a in (*again[:4], tmp_path / "ae", *SMALL, "--json", "-")]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == document["sha256"]


def test_sizes_are_mended_by_transforms_which_belong_to_both_steps(store, autoencoder, tmp_path, refused):
    changes = tmp_path / "changes.json"
    odd = {"images": [{"key": "eye", "crop": [], "size": [60, 64]}]}
    changes.write_text(json.dumps(odd))
    arguments = ["train-autoencoder", "--dataset", store, "--out", tmp_path / "ae", "--transforms", changes, *SMALL]
    refused(arguments, "multiples of 8, 'eye' has 60 x 64: resize them with --transforms", at_once=False)
    changes.write_text(json.dumps({"images": [{"key": "eye", "crop": [], "size": [64, 64]}]}))
    training = [*frames_run(store, autoencoder, tmp_path / "run"), "--transforms", changes]
    refused(training, "(80, 64, 1), the model's are (64, 64, 1): train one with the same --transforms", at_once=False)
    refused(frames_run(store, None, tmp_path / "run"), "train an autoencoder on the pictures first", at_once=False)
    refused(frames_run(store, tmp_path / "no", tmp_path / "run"), "there is no autoencoder at", at_once=False)


def test_frames_are_imagined_as_latents_with_a_checkpoint_alone(store, autoencoder, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(frames_run(store, autoencoder, run)) == 0
    hidden = autoencoder.rename(tmp_path / "hidden")
    try:
        arguments = [str(run), "--dataset", str(store), "--episode", "1", "--out"]
        imagine = ["imagine", *arguments, str(tmp_path / "imagined"), "--context", "4", "--num-denoising-steps", "2"]
        assert main(imagine) == 0
        document = json.loads((tmp_path / "imagined" / "frames.json").read_text())
        assert document["frames"] == 8
        assert np.isfinite(document["psnr"]["imagined"]["mean"]).all()
        assert main(["surprise", *arguments, str(tmp_path / "surprise")]) == 0
        usual = json.loads((tmp_path / "surprise" / "surprise.json").read_text())["calibration"]["usual"]
        assert np.shape(usual["everywhere"]) == (5, 4)
        capsys.readouterr()
        assert main(["info", str(run)]) == 0
    finally:
        hidden.rename(autoencoder)
    shown = capsys.readouterr().out
    assert "frames       of eye, patches of 16 pixels as 12 numbers of an autoencoder" in shown
    assert ", autoencoder " in shown


def test_of_several_datasets_the_episodes_are_held_out_that_training_holds_out(store):
    from scd_robot.datasets import open_dataset
    from scd_robot.datasets.combine import join_datasets
    from scd_robot.datasets.windows import split_episodes
    from scd_robot.training.autoencoder import AutoencoderTraining

    data = join_datasets([open_dataset(store)] * 2, ["a", "b"])
    _, held_out = AutoencoderTraining(updates=1, held_out=0.25).split(data)
    assert held_out.tolist() == split_episodes(8, 0.25, 0, data.parts)[1].tolist()
    assert {int(data.parts[number]) for number in held_out} == {0, 1}


def test_a_device_that_is_not_there_is_told_before_the_training(store, tmp_path, refused):
    arguments = ["train-autoencoder", "--dataset", store, "--out", tmp_path / "ae", *SMALL]
    refused([*arguments, "--device", "abacus"], "cannot use device 'abacus'")
