//! memvid-core's own indexes over the frames of one of our capsules: what the layout is compared with.

use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use memvid_core::io::header::HeaderCodec;
use memvid_core::types::Toc;
use memvid_core::{find_last_valid_footer, CommitFooter, Memvid};

use crate::error::{At, Error, Result};
use crate::reader::CapsuleReader;

/// Takes the lexical and the time index out of the capsule at `path` and has memvid-core build and commit its own.
///
/// memvid-core indexes a frame by its `search_text` (or its payload under a text media type), so the frames get their
/// text there first. Its `put` cannot serve as the peer: it adds title, uri, tags and metadata to every indexed text.
pub fn commit(path: &Path) -> Result<()> {
    let bytes = std::fs::read(path).at(path)?;
    let footer = find_last_valid_footer(&bytes).ok_or_else(|| Error::Unreadable {
        path: path.into(),
        reason: "no valid footer".into(),
    })?;
    let mut toc = Toc::decode(footer.toc_bytes)?;
    let reader = CapsuleReader::open(path)?;
    for (id, frame) in toc.frames.iter_mut().enumerate() {
        frame.search_text = Some(reader.text(id)?);
    }
    toc.segment_catalog = Default::default();
    toc.segment_catalog.lex_enabled = true;
    toc.indexes.lex_segments.clear();
    toc.time_index = None;
    toc.toc_checksum = [0; 32];
    toc.toc_checksum = Toc::calculate_checksum(&toc.encode()?);
    let encoded = toc.encode()?;
    let seal = CommitFooter {
        toc_len: encoded.len() as u64,
        toc_hash: *blake3::hash(&encoded).as_bytes(),
        generation: footer.footer.generation + 1,
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .at(path)?;
    let mut header = HeaderCodec::read(&mut file)?;
    file.seek(SeekFrom::Start(header.footer_offset)).at(path)?;
    file.write_all(&encoded).at(path)?;
    file.write_all(&seal.encode()).at(path)?;
    let end = file.stream_position().at(path)?;
    file.set_len(end).at(path)?;
    header.toc_checksum = toc.toc_checksum;
    HeaderCodec::write(&mut file, &header)?;
    drop(file);

    let mut capsule = Memvid::open(path)?;
    capsule.enable_lex()?;
    capsule.finalize_indexes()?;
    Ok(())
}
