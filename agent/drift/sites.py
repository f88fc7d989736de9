"""Which site a camera belongs to: cameras in one place share weather, light and dirt."""

from __future__ import annotations

#: Divides a camera's site from its name.
SEPARATOR = "/"


def site_of(camera: str, default: str) -> str:
    """What stands before the last "/" of the camera's id; `default` where there is none.

    "plant-3/gate-north" is of the site "plant-3".
    """
    return camera.rpartition(SEPARATOR)[0] or default
