"""Colours of images that carry an ICC profile, as browsers show them on a screen of sRGB: photos of phones do."""

from __future__ import annotations

import io
from functools import lru_cache

from PIL import Image, ImageCms

_SPACES = {"RGB": "RGB", "RGBA": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # of a profile, by the mode of its image
_HELD = 16  # profiles, of which a set of images has few


def in_srgb(image: Image.Image) -> Image.Image:
    """Convert an image from its embedded profile to sRGB; unchanged without a profile, or with one for another mode."""
    profile = image.info.get("icc_profile")
    transform = _transform(profile, image.mode) if isinstance(profile, bytes) and image.mode in _SPACES else None
    return image if transform is None else transform.apply(image)


@lru_cache(_HELD)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The way from a profile to sRGB; None from sRGB itself, and where a browser does without the profile, too."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = source.profile.profile_description or ""
        if source.profile.xcolor_space.strip() != _SPACES[mode] or "srgb" in name.lower():
            return None
        target = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(source, target, mode, mode if mode == "RGBA" else "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
