"""Exported policies: what runs them (no torch), and in `scd_robot.export.write` what makes them."""

from scd_robot.export.manifest import FORMATS, Manifest, is_export, read_manifest
from scd_robot.export.policy import ExportedPolicy, OnnxPolicy, load_exported

__all__ = ["FORMATS", "ExportedPolicy", "Manifest", "OnnxPolicy", "is_export", "load_exported", "read_manifest"]
