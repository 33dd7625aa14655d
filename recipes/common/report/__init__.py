"""Reports of a run: pictures, curves and tables."""

from common.report.pictures import Pictures, draw_pictures, framed, gray_out, heat_maps, shown
from common.report.reconstruction import as_pixels, pictures_of, reconstruction

__all__ = [
    "Pictures",
    "as_pixels",
    "draw_pictures",
    "framed",
    "gray_out",
    "heat_maps",
    "pictures_of",
    "reconstruction",
    "shown",
]
