"""Checks the names in two built wheels: python check_wheels.py SCD_ROBOT.whl LEROBOT_POLICY_SCD.whl.

LeRobot imports distributions whose `Name` begins with `lerobot_policy_`, by that name as it stands: a build backend
that writes hyphens there would hide the policy.
"""

import sys
import zipfile
from email.parser import Parser


def contents(wheel):
    """The distribution's name, and the folders and modules at the top of it."""
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        name = Parser().parsestr(archive.read(metadata).decode())["Name"]
        tops = {path.partition("/")[0] for path in archive.namelist()}
    return name, {top for top in tops if not top.endswith(".dist-info")}


if __name__ == "__main__":
    for wheel, name in zip(sys.argv[1:], ("scd_robot", "lerobot_policy_scd"), strict=True):
        assert contents(wheel) == (name, {name}), f"{wheel} is {contents(wheel)}, expected {name} alone"
    print("the wheels have their names, and nothing else in them")
