"""Image files and folders as a source without labels."""

from collections.abc import Sequence
from pathlib import Path

from common.config import SettingsError
from common.data.sources import SUFFIXES, _find_images, decode

from torch import Tensor


class Files:
    """Image files and all images below folders, in the given order; those of a folder are sorted.

    Args:
        paths: files and folders.
        channels: 1 decodes to grayscale, 3 to RGB.

    Raises:
        SettingsError: if a path does not exist, a folder has no images, or `channels` is neither 1 nor 3.
    """

    def __init__(self, paths: Sequence[Path], channels: int) -> None:
        if channels not in (1, 3):
            raise SettingsError(f"files decode to 1 or 3 channels, but the network takes {channels}")
        self.channels, self.classes, self._paths = channels, list[str](), list[str]()
        for path in paths:
            if path.is_dir():
                names = _find_images(path)
                if not names:
                    raise SettingsError(f"{path} holds no image ({', '.join(SUFFIXES)})")
                self._paths += [str(path / name) for name in names]
            elif path.exists():
                self._paths.append(str(path))
            else:
                raise SettingsError(f"{path} is neither a file nor a folder")

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, index: int) -> Tensor:
        """Decode a file."""
        return decode(self._paths[index], self.channels)

    def label(self, index: int) -> int:
        """Return −1, since the class is unknown."""
        return -1

    def name(self, index: int) -> str:
        """Return the path of a file."""
        return self._paths[index]
