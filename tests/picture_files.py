"""Write image files of odd formats, with the pixels that they must give: TIFF, PNG, Netpbm and BMP by hand."""

import struct
import zlib

import numpy as np

REVERSED = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)[:, ::-1], axis=1)[:, 0]


def pack_rows(samples, bits, order):
    """Pack samples (rows, count) of any number of bits into bytes; each row begins at a byte."""
    if bits in (8, 16, 32, 64):
        return samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    digits = (samples[..., None] >> np.arange(bits - 1, -1, -1, dtype=samples.dtype)) & 1
    return np.packbits(digits.reshape(len(samples), -1).astype(np.uint8), axis=1).tobytes()


def encode_block(samples, bits, *, order, compression, predictor, fill_order, encoders):
    """Encode a strip or tile: samples (rows, columns, channels)."""
    if predictor == 2:
        samples = np.concatenate([samples[:, :1], samples[:, 1:] - samples[:, :-1]], axis=1)  # wraps around
    data = pack_rows(samples.reshape(len(samples), -1), bits, order)
    if compression == 8:
        data = zlib.compress(data)
    elif compression == 5:
        data = encoders.lzw_encode(data)
    elif compression == 32773:
        width = len(data) // len(samples)
        data = b"".join(bytes(encoders.packbits_encode(data[i : i + width])) for i in range(0, len(data), width))
    data = bytes(data)
    return REVERSED[np.frombuffer(data, np.uint8)].tobytes() if fill_order == 2 else data


def write_tiff(
    path, samples, bits, *, photometric=1, order="<", big=False, planar=False, tile=None, rows_per_strip=None,
    compression=1, predictor=1, fill_order=1, sample_format=1, tags=None, encoders=None,
):  # fmt: skip
    """Write samples (H, W, channels) as TIFF or BigTIFF; ``tags`` are further tags of shorts."""
    height, width, channels = samples.shape
    planes = [samples[:, :, c : c + 1] for c in range(channels)] if planar else [samples]
    blocks = []
    for plane in planes:
        if tile:
            th, tw = tile
            padded = np.pad(plane, ((0, -height % th), (0, -width % tw), (0, 0)))
            blocks += [padded[y : y + th, x : x + tw] for y in range(0, height, th) for x in range(0, width, tw)]
        else:
            step = rows_per_strip or height
            blocks += [plane[y : y + step] for y in range(0, height, step)]
    options = {"order": order, "compression": compression, "predictor": predictor, "fill_order": fill_order}
    data = [encode_block(block, bits, **options, encoders=encoders) for block in blocks]
    entries = {
        256: [width], 257: [height], 258: [bits] * channels, 259: [compression], 262: [photometric], 277: [channels],
        284: [2 if planar else 1], 339: [sample_format] * channels,
    }  # fmt: skip
    entries |= {266: [fill_order]} if fill_order != 1 else {}
    entries |= {317: [predictor]} if predictor != 1 else {}
    entries |= {322: [tile[1]], 323: [tile[0]]} if tile else {278: [rows_per_strip or height]}
    entries |= tags or {}
    word, header = ("Q", 16) if big else ("I", 8)
    content, offsets = bytearray(), []
    for block in data:
        offsets.append(header + len(content))
        content += block + bytes(len(block) % 2)
    entries |= {324: offsets, 325: [len(b) for b in data]} if tile else {273: offsets, 279: [len(b) for b in data]}
    inline = 8 if big else 4
    rows = []
    for tag in sorted(entries):
        is_offset = tag in (273, 279, 324, 325)
        code, kind = (word, 16 if big else 4) if is_offset else ("H", 3)
        value = struct.pack(f"{order}{len(entries[tag])}{code}", *entries[tag])
        if len(value) > inline:
            place = header + len(content)
            content += value + bytes(len(value) % 2)
            value = struct.pack(order + word, place)
        rows.append(struct.pack(order + "HH" + word, tag, kind, len(entries[tag])) + value.ljust(inline, b"\0"))
    first = header + len(content)
    content += struct.pack(order + ("Q" if big else "H"), len(rows)) + b"".join(rows) + struct.pack(order + word, 0)
    magic = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "H", 43 if big else 42)
    start = struct.pack(order + "HHQ", 8, 0, first) if big else struct.pack(order + "I", first)
    path.write_bytes(magic + start + content)
    return path


def write_png(path, samples, bits, colour, *, palette=None, chunks=(), interlaced=False):
    """Write samples (H, W, channels) as PNG; colour type 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    height, width, _ = samples.shape

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def rows(part):
        if not part.size:
            return b""
        packed = pack_rows(part.reshape(len(part), -1), bits, ">")
        length = len(packed) // len(part)
        return b"".join(b"\0" + packed[i : i + length] for i in range(0, len(packed), length))

    if interlaced:  # Adam7
        steps = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
        data = b"".join(rows(samples[y::dy, x::dx]) for y, x, dy, dx in steps)
    else:
        data = rows(samples)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced))
    body = chunk(b"IHDR", header) + b"".join(chunk(*pair) for pair in chunks if pair[0] != b"tRNS")
    if palette is not None:
        body += chunk(b"PLTE", palette.astype(np.uint8).tobytes())
    body += b"".join(chunk(*pair) for pair in chunks if pair[0] == b"tRNS")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b""))
    return path


def write_netpbm(path, samples, full, *, plain=False, comment=False):
    """Write samples (H, W, 1 or 3) as PGM or PPM, or as PBM where ``full`` is 1 (1 is white in the samples)."""
    height, width, channels = samples.shape
    kind = {(1, True): 1, (1, False): 4}.get((full, plain), (2 if plain else 5) + (channels == 3))
    header = f"P{kind}\n" + ("# a comment 12 34\n" if comment else "") + f"{width} {height}\n"
    header += "" if full == 1 else f"{full}\n"
    if full == 1:
        samples = 1 - samples
    if plain:
        data = "\n".join(" ".join(map(str, row)) for row in samples.reshape(height, -1).tolist()).encode() + b"\n"
    elif full == 1:
        data = pack_rows(samples.reshape(height, -1), 1, ">")
    else:
        data = samples.astype(">u2" if full > 255 else "u1").tobytes()
    path.write_bytes(header.encode() + data)
    return path


def write_bmp(path, samples, *, bits=24, top_down=False, palette=None):
    """Write samples (H, W, channels) as BMP: channels 1 with a palette (n, 3), 3 (BGR order in the file) or 4."""
    height, width, channels = samples.shape
    if bits == 16:  # 5 bits for each colour
        values = samples.astype(np.uint16)
        data = (values[..., 0] << 10 | values[..., 1] << 5 | values[..., 2]).astype("<u2")
        rows = [row.tobytes() for row in data]
    elif palette is not None:
        rows = [pack_rows(row[None, :, 0], bits, "<") for row in samples]
    else:
        order = [2, 1, 0, 3][:channels]
        rows = [row[:, order].astype(np.uint8).tobytes() for row in samples]
    rows = [row + bytes(-len(row) % 4) for row in (rows if top_down else rows[::-1])]
    table = b"" if palette is None else np.pad(palette[:, ::-1], ((0, 0), (0, 1))).astype(np.uint8).tobytes()
    info = struct.pack("<IiiHHIIiiII", 40, width, -height if top_down else height, 1, bits, 0, 0, 0, 0,
                       0 if palette is None else len(palette), 0)  # fmt: skip
    body = b"".join(rows)
    start = 14 + len(info) + len(table)
    path.write_bytes(b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + info + table + body)
    return path
