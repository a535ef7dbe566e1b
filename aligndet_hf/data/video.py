"""The frames of a video, as images of a list."""

import cv2
import numpy as np

from .errors import ImageError
from .image_list import Images


class VideoFrames(Images):
    """
    The frames of a video, in their order, through OpenCV.

    A frame is reached by decoding all frames before it: to seek is not exact in every format. Frames that are read in
    their order are decoded once. How many there are is found by counting; what a header says is often wrong.

    Args:
        path (`str`): The file.
        name (`str`): What to call it in the output.

    Raises:
        [`ImageError`]: the video cannot be read, or ends before the number of frames that its header tells.
    """

    def __init__(self, path: str, name: str):
        self.path, self.files = path, [(name, path)]
        self.capture, self.position = None, 0
        capture, count = self._open(), 0
        while capture.grab():
            count += 1
        self.lacking = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) - count)
        self.names = [f"{name}/{index:06d}.jpg" for index in range(count)]
        if count == 0:
            raise ImageError(f"Cannot read the video {path}: it has no frame that OpenCV can decode.")

    def _open(self) -> cv2.VideoCapture:
        capture = cv2.VideoCapture(self.path)
        if not capture.isOpened():
            raise ImageError(f"Cannot read the video {self.path}: OpenCV does not open it.")
        return capture

    def __getstate__(self) -> dict:  # an open video does not travel to another process
        return self.__dict__ | {"capture": None, "position": 0}

    def read(self, index: int, window: tuple[float, float] | None = None) -> np.ndarray:
        if self.capture is None or index < self.position:
            self.capture, self.position = self._open(), 0
        while self.position < index and self.capture.grab():
            self.position += 1
        found, frame = self.capture.read()
        self.position += 1
        if not found:
            raise ImageError(f"Cannot read frame {index} of the video {self.path}.")
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
