"""Pictures and videos nobody would choose, and every place they can come from: the right pixels or one clear error."""

from __future__ import annotations

import base64
import contextlib
import io
import re
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qvlmoe_jax.errors import MediaError
from qvlmoe_jax.images import load_image
from qvlmoe_jax.processor_files import VideoSettings
from qvlmoe_jax.sources import FetchLimits
from qvlmoe_jax.videos import load_clip
from tests.processor_cases import VIDEO_FILES, clip, picture


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def pixels(source: Any) -> np.ndarray:
    image = load_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


SAME = np.asarray(picture(24, 36))
PNG = encoded(picture(24, 36))


class TestSources:
    def test_the_same_picture_from_everywhere(self, tmp_path: Path) -> None:
        path = tmp_path / "a picture.png"
        path.write_bytes(PNG)
        base = base64.b64encode(PNG).decode()
        lines = "\n".join(base[i : i + 76] for i in range(0, len(base), 76))
        sources = {
            "path": path,
            "text": str(path),
            "file URL": path.as_uri(),
            "bytes": PNG,
            "file": io.BytesIO(PNG),
            "data URI": f"data:image/png;base64,{base}",
            "base64": base,
            "lines": lines,
            "PIL": picture(24, 36),
            "array": SAME,
            "channels first": SAME.transpose(2, 0, 1),
        }
        for name, source in sources.items():
            np.testing.assert_array_equal(pixels(source), SAME, err_msg=name)

    def test_percent_encoded_data_uri(self) -> None:
        quoted = "".join(f"%{byte:02X}" for byte in PNG)
        np.testing.assert_array_equal(pixels(f"data:image/png,{quoted}"), SAME)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("no/such/cat.png", "no such file"),
            ("x" * 5000, "the picture has no format"),
            ("a\0b", "no such file"),
            (Path("no/such"), "no such file"),
            ("data:image/png;base64", "has no comma"),
            ("data:image/png;base64,%%%", "is not base64"),
            ("ftp://example.invalid/cat.png", "no such file"),
            (3.5, "cannot read a float"),
            (b"", "no format"),
            (b"GIF89a", "cannot be decoded|no format"),
            (b"no picture at all", "no format"),
        ],
    )
    def test_what_is_no_picture(self, source: Any, message: str) -> None:
        with pytest.raises(MediaError, match=message) as caught:
            load_image(source)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@contextlib.contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(OSError):  # the client hangs up when it has seen enough
                answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/cat.png"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def reply(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


class TestUrls:
    def test_a_picture(self) -> None:
        with serving(lambda h: reply(h, PNG, Content_Length=str(len(PNG)))) as url:
            np.testing.assert_array_equal(pixels(url), SAME)

    def test_a_redirect(self) -> None:
        def answer(handler: BaseHTTPRequestHandler) -> None:
            if handler.path == "/cat.png":
                reply(handler, b"", 302, Location="/other.png")
            else:
                reply(handler, PNG)

        with serving(answer) as url:
            np.testing.assert_array_equal(pixels(url), SAME)

    def test_a_redirect_to_a_file_is_refused(self) -> None:
        with (
            serving(lambda h: reply(h, b"", 302, Location="file:///etc/hostname")) as url,
            pytest.raises(MediaError, match="redirect|fetched"),
        ):
            load_image(url)

    def test_not_found(self) -> None:
        with serving(lambda h: reply(h, b"gone", 404)) as url, pytest.raises(MediaError, match="404"):
            load_image(url)

    def test_nobody_listens(self) -> None:
        with serving(lambda h: reply(h, PNG)) as url:
            pass
        with pytest.raises(MediaError, match="cannot be fetched"):
            load_image(url)

    def test_too_large_by_its_header(self) -> None:
        with (
            serving(lambda h: reply(h, PNG, Content_Length=str(10**12))) as url,
            pytest.raises(MediaError, match="has 1000000000000 bytes or more, expected at most 1000"),
        ):
            load_image(url, FetchLimits(max_bytes=1000))

    def test_too_large_without_a_header(self) -> None:
        with serving(lambda h: reply(h, bytes(10**6))) as url, pytest.raises(MediaError, match="expected at most 5000"):
            load_image(url, FetchLimits(max_bytes=5000))

    def test_cut_off(self) -> None:
        with serving(lambda h: reply(h, PNG[:50], Content_Length=str(len(PNG)))) as url, pytest.raises(MediaError, match="50 of"):
            load_image(url)

    def test_a_drip_is_not_waited_for(self) -> None:
        """Each byte comes in time; all of them together do not."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            reply(handler, b"")
            for byte in PNG:
                handler.wfile.write(bytes([byte]))
                time.sleep(0.05)

        start = time.monotonic()
        with serving(answer) as url, pytest.raises(MediaError, match="took longer than 0.3 s"):
            load_image(url, FetchLimits(seconds=0.3))
        assert time.monotonic() - start < 5

    def test_silence_is_not_waited_for(self) -> None:
        with serving(lambda h: time.sleep(1)) as url, pytest.raises(MediaError, match="took longer than 0.2 s"):
            load_image(url, FetchLimits(seconds=0.2))


class TestModes:
    def test_transparency_lies_over_white(self) -> None:
        rgba = Image.fromarray(np.dstack([SAME, np.full(SAME.shape[:2], 0, np.uint8)]), "RGBA")
        half = Image.fromarray(np.dstack([SAME, np.full(SAME.shape[:2], 128, np.uint8)]), "RGBA")
        for source in (rgba, encoded(rgba), encoded(rgba, "WEBP", lossless=True, exact=True), np.asarray(rgba)):
            assert (pixels(source) == 255).all()
        expected = np.round(SAME * (128 / 255) + 255 * (127 / 255))
        for source in (half, encoded(half), np.asarray(half)):
            assert np.abs(pixels(source) - expected).max() <= 1

    def test_a_transparent_colour_of_a_palette(self) -> None:
        image = Image.new("P", (4, 4), 1)
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.putpixel((0, 0), 0)
        got = pixels(encoded(image, "PNG", transparency=1))
        assert got[0, 0].tolist() == [255, 0, 0]
        assert (got.reshape(-1, 3)[1:] == 255).all()

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX"])
    def test_every_mode(self, mode: str) -> None:
        got = pixels(
            picture(24, 36).convert("RGB").convert("L").convert(mode) if mode in ("1", "LA") else picture(24, 36).convert(mode)
        )
        expected = np.asarray(picture(24, 36).convert("L")) if mode in ("1", "L", "LA") else SAME
        assert got.shape == SAME.shape
        # a palette of 216 colours and dithering to two are coarse; the mean survives all of them
        assert abs(got.mean() - expected.mean()) < 8

    def test_sixteen_bits(self) -> None:
        grey = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
        got = pixels(encoded(Image.fromarray(grey)))
        np.testing.assert_array_equal(got, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, -1))
        assert len(np.unique(got)) == 256  # Pillow's own conversion has three quarters white

    def test_sixteen_bits_tiff(self) -> None:
        grey = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
        np.testing.assert_array_equal(pixels(encoded(Image.fromarray(grey), "TIFF"))[..., 0], grey >> 8)

    def test_thirty_two_bits(self) -> None:
        small = Image.fromarray(SAME[..., 0]).convert("I")
        np.testing.assert_array_equal(pixels(small)[..., 1], SAME[..., 0])
        with pytest.raises(MediaError, match=r"grey levels 0 \.\. 70000, expected 0 \.\. 65535"):
            load_image(Image.fromarray(np.array([[0, 70000]], np.int32)))

    def test_floats(self) -> None:
        with pytest.raises(MediaError, match="floating-point"):
            load_image(Image.fromarray(np.ones((4, 4), np.float32)))
        with pytest.raises(MediaError, match="float32, expected uint8"):
            load_image(np.ones((4, 4, 3), np.float32))

    def test_a_mode_without_a_way_to_rgb(self) -> None:
        with pytest.raises(MediaError, match="mode La"):
            load_image(Image.new("La", (4, 4)))

    def test_cmyk_jpeg(self) -> None:
        flat = Image.new("RGB", (32, 32), (200, 30, 90))
        got = pixels(encoded(flat.convert("CMYK"), "JPEG", quality=95))
        assert np.abs(got.astype(int) - [200, 30, 90]).max() < 6

    @pytest.mark.parametrize("tag", range(1, 9))
    def test_exif_orientation(self, tag: int) -> None:
        corner = np.zeros((8, 16, 3), np.uint8)
        corner[0, 0] = 255
        exif = Image.Exif()
        exif[0x0112] = tag
        file = encoded(Image.fromarray(corner), "PNG", exif=exif)
        got = pixels(file)
        where = {1: (0, 0), 2: (0, 15), 3: (7, 15), 4: (7, 0), 5: (0, 0), 6: (0, 7), 7: (15, 7), 8: (15, 0)}[tag]
        assert np.argwhere(got[..., 0])[0].tolist() == list(where)
        with Image.open(io.BytesIO(file)) as opened:  # and handed over as a PIL picture
            np.testing.assert_array_equal(pixels(opened), got)

    @pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0no tags at all", b"Exif\0\0II*\0\xff\xff\xff\x7f"])
    def test_exif_that_cannot_be_read(self, exif: bytes) -> None:
        plain, damaged = encoded(picture(24, 36), "JPEG"), encoded(picture(24, 36), "JPEG", exif=exif)
        np.testing.assert_array_equal(pixels(damaged), pixels(plain))

    @pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
    def test_the_first_frame_of_an_animation(self, form: str) -> None:
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "white")]
        options = {"lossless": True} if form == "WEBP" else {}
        assert (pixels(encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)) == [255, 0, 0]).all()

    def test_arrays(self) -> None:
        grey = SAME[..., 0]
        for source in (grey, grey[..., None], grey[None]):
            np.testing.assert_array_equal(pixels(source), np.repeat(grey[..., None], 3, -1))
        assert pixels(np.zeros((1, 1, 3), np.uint8)).shape == (1, 1, 3)
        assert pixels(np.zeros((3, 5, 3), np.uint8)).shape == (3, 5, 3)  # channels last where both fit
        for shape in ((2, 2, 2), (0, 4, 3), (4, 0, 3), (2, 2, 2, 3), (7,), ()):
            with pytest.raises(MediaError, match="expected \\[H,W,3\\]"):
                load_image(np.zeros(shape, np.uint8))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


class TestDamage:
    @pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
    @pytest.mark.parametrize("kept", [0.3, 0.7])
    def test_truncated(self, form: str, kept: float) -> None:
        whole = encoded(picture(64, 64), form)
        with pytest.raises(MediaError, match="cannot be decoded|no format"):
            load_image(whole[: int(len(whole) * kept)])
        load_image(whole)

    def test_truncated_and_opened_by_the_caller(self) -> None:
        whole = encoded(picture(64, 64), "JPEG")
        with Image.open(io.BytesIO(whole[: len(whole) // 2])) as image, pytest.raises(MediaError, match="cannot be decoded"):
            load_image(image)

    def test_a_reader_that_raises_what_it_likes(self) -> None:
        """Pillow's reader of this format has NotImplementedError for it, that of AVIF RuntimeError, others AttributeError."""
        damaged = bytearray(encoded(picture(8, 8), "DDS"))
        damaged[80] = 0
        with pytest.raises(MediaError, match="^the picture cannot be decoded: Unknown pixel format flags 0; expected"):
            load_image(bytes(damaged))

    def test_decompression_bomb(self) -> None:
        """A few bytes that claim 12000 x 12000 (above Pillow's warning) and 60000 x 60000 (above its error) pixels."""
        for side in (12000, 60000):
            header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
            bomb = (
                b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
            )
            with pytest.raises(MediaError, match=f"more than {Image.MAX_IMAGE_PIXELS} pixels"):
                load_image(bomb)

    def test_no_program_is_run_for_a_drawing(self) -> None:
        eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
        with pytest.raises(MediaError, match="is a drawing"):
            load_image(eps)

    def test_a_program_is_no_picture(self, tmp_path: Path) -> None:
        with pytest.raises(MediaError, match="no such file"):
            load_image(tmp_path)


class TestVideos:
    def test_a_file_from_everywhere(self) -> None:
        path = VIDEO_FILES / "mpeg4_25fps_13frames.mp4"
        data = path.read_bytes()
        expected = load_clip(path, VideoSettings())
        assert expected.frames.shape[0] == 4
        with serving(lambda h: reply(h, data)) as url:
            uri = "data:video/mp4;base64," + base64.b64encode(data).decode()
            for source in (str(path), data, io.BytesIO(data), uri, url):
                np.testing.assert_array_equal(load_clip(source, VideoSettings()).frames, expected.frames)

    def test_a_header_that_does_not_count_its_frames(self) -> None:
        path = VIDEO_FILES / "h264_10fps_31frames_uncounted.mkv"
        got = load_clip(path, VideoSettings(do_sample_frames=False))
        assert got.frames.shape == (31, 64, 64, 3)
        assert got.timestamps[-1] == 3.0  # the last frame twice
        assert len(load_clip(path, VideoSettings(fps=1)).frames) == 4

    def test_a_header_that_counts_too_many(self, caplog: pytest.LogCaptureFixture) -> None:
        """The sample table of an AVI is at its end: cut the file there and the frames that remain are read."""
        data = (VIDEO_FILES / "mpeg4_1fps_9frames.avi").read_bytes()
        cut = data[: int(len(data) * 0.6)]
        got = load_clip(cut, VideoSettings(do_sample_frames=False))
        assert 2 <= len(got.frames) < 9
        assert "of the 9 that its header counts" in caplog.text

    def test_turned_upright(self) -> None:
        """A phone's display matrix (a quarter turn clockwise), written into the track header."""
        data = bytearray((VIDEO_FILES / "mpeg4_25fps_13frames.mp4").read_bytes())
        at = data.index(b"tkhd") + 4 + 40
        data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
        sideways = load_clip(VIDEO_FILES / "mpeg4_25fps_13frames.mp4", VideoSettings(do_resize=False, patch_size=8))
        upright = load_clip(bytes(data), VideoSettings(do_resize=False, patch_size=8))
        np.testing.assert_array_equal(upright.frames, np.rot90(sideways.frames, -1, axes=(1, 2)))

    def test_frames_from_paths(self, tmp_path: Path) -> None:
        for i, frame in enumerate(clip(5, 40, 50)):
            Image.fromarray(frame).save(tmp_path / f"{i}.png")
        paths = [str(tmp_path / f"{i}.png") for i in range(5)]
        settings = VideoSettings(do_sample_frames=False)
        np.testing.assert_array_equal(load_clip(paths, settings).frames, load_clip(clip(5, 40, 50), settings).frames)

    def test_repeated_frames_of_a_file(self) -> None:
        got = load_clip(VIDEO_FILES / "mpeg4_1fps_9frames.avi", VideoSettings(fps=None, num_frames=17))
        assert len(got.frames) == 17
        np.testing.assert_array_equal(got.frames[0], load_clip(VIDEO_FILES / "mpeg4_1fps_9frames.avi", VideoSettings()).frames[0])

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (clip(1, 40, 40), "has 1 frame, expected at least 2; pass it as a picture"),
            ([picture(40, 40)], "has 1 frame, expected at least 2"),
            ([], "has no frames"),
            (clip(4, 2, 900), "the clip is 900 x 2 pixels, an aspect ratio of 450.00; expected at most 200: crop it"),
            (np.zeros((4, 8, 8, 3), np.float32), "float32, expected uint8"),
            (np.zeros((4, 8, 8, 2), np.uint8), r"shape \[4, 8, 8, 2\], expected \[frames,H,W,3\]"),
            ([picture(40, 40), picture(40, 41)], "differ in size"),
            (b"no video at all", "cannot be decoded"),
            ("no/such.mp4", "no such file"),
            ((VIDEO_FILES / "h264_2997fps_75frames.mp4").read_bytes()[:5000], "cannot be decoded"),
        ],
        ids=["one", "one picture", "none", "sliver", "floats", "channels", "sizes", "text", "missing", "truncated"],
    )
    def test_what_is_no_video(self, source: Any, message: str) -> None:
        with pytest.raises(MediaError, match=message) as caught:
            load_clip(source, VideoSettings())
        assert "\n" not in str(caught.value)

    def test_a_file_of_the_wrong_size_is_named(self) -> None:
        file = VIDEO_FILES / "mpeg4_25fps_13frames.mp4"
        with pytest.raises(MediaError, match=f"^{re.escape(str(file))} is .* and do_resize is off; expected multiples of 2000"):
            load_clip(file, VideoSettings(do_resize=False, patch_size=1000))

    def test_a_sound_file(self) -> None:
        import wave

        file = io.BytesIO()
        with wave.open(file, "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(8000)
            sound.writeframes(bytes(8000))
        with pytest.raises(MediaError, match="no video stream"):
            load_clip(file.getvalue(), VideoSettings())
