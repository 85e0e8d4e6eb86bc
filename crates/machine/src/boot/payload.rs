//! The compressed kernel in a bzImage, unpacked as `scripts/extract-vmlinux` of Linux does it.

use std::io::{self, Read};

/// The block size of LZ4's legacy format, in bytes; each block but the last one unpacks to it.
const LZ4_BLOCK: usize = 8 << 20;
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const ELF: [u8; 4] = *b"\x7fELF";
/// Formats that are recognised, to be named.
const OTHERS: [(&[u8], &str); 4] =
    [(b"\xfd7zXZ\0", "XZ"), (b"BZh", "bzip2"), (&[0x5d, 0, 0], "LZMA"), (&[0x89, b'L', b'Z', b'O'], "LZO")];
/// Linux' build appends the unpacked size, 4 bytes, to formats that do not hold it.
const APPENDED_SIZE: usize = 4;

/// Unpacks `payload` to at most `limit` bytes.
///
/// # Errors
/// The reason, as the end of a sentence about the payload.
pub(super) fn unpack(payload: &[u8], limit: u64) -> Result<Vec<u8>, String> {
    let damaged = |error: io::Error| format!("cannot be unpacked: {error}");
    if payload.starts_with(&ELF) {
        return Ok(payload.to_owned());
    }
    if payload.starts_with(&GZIP) {
        return read_all(flate2::read::GzDecoder::new(payload), limit);
    }
    if payload.starts_with(&ZSTD) {
        let decoder = ruzstd::decoding::StreamingDecoder::new(payload);
        return read_all(decoder.map_err(|error| damaged(io::Error::other(error.to_string())))?, limit);
    }
    if let Some(blocks) = payload.strip_prefix(&LZ4_LEGACY) {
        return lz4(blocks, limit);
    }
    let format = OTHERS.iter().find(|(magic, _)| payload.starts_with(magic));
    let format =
        format.map_or("in a format that vmm does not know".to_owned(), |(_, name)| format!("compressed with {name}"));
    Err(format!(
        "is {format}; vmm unpacks gzip, LZ4 and Zstandard. Unpack it with Linux' scripts/extract-vmlinux and use the result"
    ))
}

fn read_all(decoder: impl Read, limit: u64) -> Result<Vec<u8>, String> {
    let mut unpacked = Vec::new();
    let read = decoder.take(limit.saturating_add(1)).read_to_end(&mut unpacked);
    read.map_err(|error| format!("cannot be unpacked: {error}"))?;
    within(unpacked, limit)
}

fn within(unpacked: Vec<u8>, limit: u64) -> Result<Vec<u8>, String> {
    if u64::try_from(unpacked.len()).is_ok_and(|length| length <= limit) {
        Ok(unpacked)
    } else {
        Err(format!("unpacks to more than {limit} bytes"))
    }
}

/// LZ4's legacy format: blocks, each with its length before it (4 bytes, little endian).
fn lz4(blocks: &[u8], limit: u64) -> Result<Vec<u8>, String> {
    let cut_off = || "cannot be unpacked: it ends within a block".to_owned();
    let mut unpacked = Vec::new();
    let mut rest = blocks;
    let mut buffer = vec![0; LZ4_BLOCK];
    // The appended size is no block.
    while rest.len() > APPENDED_SIZE {
        let (length, after) = rest.split_first_chunk::<4>().ok_or_else(cut_off)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| cut_off())?;
        let (block, after) = after.split_at_checked(length).ok_or_else(cut_off)?;
        let size = lz4_flex::block::decompress_into(block, &mut buffer);
        let size = size.map_err(|error| format!("cannot be unpacked: {error}"))?;
        if size < LZ4_BLOCK && after.len() > APPENDED_SIZE {
            return Err("cannot be unpacked: a block before the last one is not whole".to_owned());
        }
        unpacked.extend(buffer.get(..size).unwrap_or_default());
        unpacked = within(unpacked, limit)?;
        rest = after;
    }
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// With the size behind it, as Linux' build appends it.
    fn zstd(bytes: &[u8]) -> Vec<u8> {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        let size = u32::try_from(bytes.len()).unwrap().to_le_bytes();
        [ruzstd::encoding::compress_to_vec(bytes, level), size.to_vec()].concat()
    }

    fn lz4_legacy(bytes: &[u8]) -> Vec<u8> {
        let block = |block: &[u8]| {
            let packed = lz4_flex::block::compress(block);
            [u32::try_from(packed.len()).unwrap().to_le_bytes().to_vec(), packed].concat()
        };
        let blocks: Vec<u8> = bytes.chunks(LZ4_BLOCK).flat_map(block).collect();
        [LZ4_LEGACY.to_vec(), blocks, u32::try_from(bytes.len()).unwrap().to_le_bytes().to_vec()].concat()
    }

    // Catches: a second block or the appended size misread; a payload that unpacks to more memory than allowed; a
    // damaged one that is half unpacked or ends the process.
    #[test]
    fn every_format_is_unpacked_within_the_limit() {
        let kernel: Vec<u8> = (0..LZ4_BLOCK + 1000).map(|at| (at / 700).to_le_bytes()[0]).collect();
        let limit = kernel.len() as u64;
        for packed in [gzip(&kernel), zstd(&kernel), lz4_legacy(&kernel)] {
            assert!(unpack(&packed, limit).unwrap() == kernel);
            let refused = unpack(&packed, limit - 1).unwrap_err();
            assert!(refused.contains("unpacks to more than"), "{refused}");
            let cut = unpack(packed.get(..packed.len() / 2).unwrap(), limit);
            assert!(
                cut.as_ref().is_err_and(|reason| reason.contains("cannot be unpacked")),
                "{:?}",
                cut.map(|b| b.len())
            );
        }
        assert_eq!(unpack(b"\x7fELF", 9).unwrap(), b"\x7fELF");
    }

    // Catches: a format that vmm cannot unpack, reported without its name or a way out.
    #[test]
    fn other_formats_are_named() {
        let refused = unpack(b"\xfd7zXZ\0...", 1 << 20).unwrap_err();
        assert!(refused.contains("compressed with XZ") && refused.contains("extract-vmlinux"), "{refused}");
        assert!(unpack(b"??", 1 << 20).unwrap_err().contains("does not know"));
        assert!(unpack(b"", 1 << 20).is_err());
    }
}
