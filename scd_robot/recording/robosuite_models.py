"""What a recording of robosuite tells about its environment, and its models brought up to robosuite 1.5."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scd_robot.datasets.schema import EpisodeDataset
from scd_robot.errors import DatasetError, SimulatorError

__all__ = ["recorded_arguments", "recorded_version", "upgraded"]

_ROBOMIMIC_TYPE = 1  # of robosuite among the kinds of environments that robomimic knows
_NAMES = (
    (re.compile(r"^gripper(\d+)_(?!right_(?!gripper$))"), r"gripper\1_right_"),
    (re.compile(r"^mount(\d+)_"), r"fixed_mount\1_"),
)
_MOVED = (("/assets/mounts/", "/assets/bases/"),)


def recorded_arguments(dataset: EpisodeDataset) -> dict[str, Any]:
    """What `robosuite.make` was called with, from whichever attribute of the file holds it.

    Raises:
        DatasetError: the file does not tell, or names an environment that is none of robosuite.
    """
    notes = dataset.metadata
    found: Any = next((notes[name] for name in ("env_args", "env_info") if notes.get(name)), {})
    try:
        found = json.loads(found) if isinstance(found, str) else dict(found)
        if found.get("type", _ROBOMIMIC_TYPE) != _ROBOMIMIC_TYPE:
            raise DatasetError(f"the environment of {dataset.spec.source} is not one of robosuite, by its env_args")
        arguments = {**found.get("env_kwargs", found), "env_name": found.get("env_name", notes.get("env"))}
    except (ValueError, TypeError, AttributeError) as error:
        raise DatasetError(f"env_args or env_info of {dataset.spec.source} cannot be read: {error}") from error
    if not isinstance(arguments["env_name"], str):
        raise DatasetError(f"{dataset.spec.source} does not tell its environment ('env', 'env_info' or 'env_args')")
    return {key: value for key, value in arguments.items() if key not in ("type", "env_version")}


def recorded_version(notes: Mapping[str, Any]) -> str:
    """Of robosuite, from a dataset's metadata; "of an unknown version" where it does not tell."""
    in_arguments = notes.get("env_args") if isinstance(notes.get("env_args"), Mapping) else {}
    version = notes.get("repository_version") or (in_arguments or {}).get("env_version")
    return str(version) if version else "of an unknown version"


def upgraded(recorded: str, installed: str) -> str:
    """A recorded model with the names and files of robosuite 1.5, and with what its robots have besides.

    `gripper0_` becomes `gripper0_right_`, `mount0_` `fixed_mount0_`. The installed robots' visual meshes and sites are
    added, geoms without mass and contacts, since robosuite looks for them; meshes that are gone draw nothing.

    Args:
        recorded: model of the recording.
        installed: model of the same environment as the installed robosuite makes it.

    Raises:
        SimulatorError: a mesh that takes part in contacts is not there any more.
    """
    old, new = ElementTree.fromstring(recorded), ElementTree.fromstring(installed)
    _rename(old)
    _drop_missing_meshes(old)
    assets = {(element.tag, element.get("name")) for element in old.iterfind("asset/*")}
    old.find("asset").extend(  # type: ignore[union-attr]
        element for element in new.iterfind("asset/*") if (element.tag, element.get("name")) not in assets
    )
    names = {(element.tag, element.get("name")) for element in old.iter()}
    bodies = {body.get("name"): body for body in old.iter("body")}
    for body in new.iter("body"):
        if body.get("name") not in bodies:
            if body.get("mocap"):  # drawn targets that move with nothing
                old.find("worldbody").append(body)  # type: ignore[union-attr]
            continue
        for element in body:
            if element.tag in ("geom", "site") and (element.tag, element.get("name")) not in names:
                if element.tag == "geom":
                    element.attrib |= {"contype": "0", "conaffinity": "0", "mass": "0"}
                bodies[body.get("name")].append(element)
    return ElementTree.tostring(old, encoding="unicode")


def _rename(model: ElementTree.Element) -> None:
    for element in model.iter():
        for attribute, value in element.attrib.items():
            for pattern, replacement in () if attribute == "file" else _NAMES:
                value = pattern.sub(replacement, value)
            for before, after in _MOVED if attribute == "file" else ():
                value = value.replace(before, after)
            element.set(attribute, value)


def _drop_missing_meshes(model: ElementTree.Element) -> None:
    """Removes meshes whose files are gone, and what they draw."""
    assets = model.find("asset")
    missing = [e for e in model.iterfind("asset/mesh") if e.get("file") and not Path(e.get("file", "")).is_file()]
    names = {element.get("name") for element in missing}
    for body in model.iter("body"):
        for geom in [geom for geom in body.iterfind("geom") if geom.get("mesh") in names]:
            if (geom.get("contype"), geom.get("conaffinity")) != ("0", "0"):
                raise SimulatorError(f"the mesh {geom.get('mesh')!r} takes part in contacts and its file is gone")
            body.remove(geom)
    for element in missing:
        assets.remove(element)  # type: ignore[union-attr]
