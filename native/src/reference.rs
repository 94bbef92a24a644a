//! The same frames committed by memvid-core itself: what the layout is compared with in tests and benchmarks.

use std::path::Path;

use memvid_core::{Memvid, PutManyOpts, PutOptions};

use crate::error::Result;
use crate::layout::{extra_metadata, FrameDoc};

/// Bytes of WAL for each frame; a WAL that grows inside a batch loses frames (`docs/capsule.md`).
const WAL_BYTES_PER_FRAME: u64 = 8 * 1024;

/// Writes a capsule through memvid-core's batch API and its own commit.
pub fn commit(
    path: &Path,
    frames: Vec<(FrameDoc, Option<Vec<f32>>)>,
    timestamp: i64,
) -> Result<()> {
    let mut capsule = Memvid::create(path)?;
    capsule.enable_lex()?;
    if frames.iter().any(|(_, vector)| vector.is_some()) {
        capsule.enable_vec()?;
    }
    let wal_pre_size_bytes = frames.len() as u64 * WAL_BYTES_PER_FRAME;
    capsule.begin_batch(PutManyOpts {
        wal_pre_size_bytes,
        disable_auto_checkpoint: true,
        ..Default::default()
    })?;
    for (doc, vector) in frames {
        let options = PutOptions {
            timestamp: Some(timestamp),
            extra_metadata: extra_metadata(&doc.metadata).map_err(|err| crate::Error::Frame {
                frame: 0,
                reason: err.to_string(),
            })?,
            track: Some(doc.track),
            kind: Some(doc.kind),
            uri: Some(doc.uri),
            title: Some(doc.title),
            search_text: Some(doc.text.clone()),
            tags: doc.tags,
            auto_tag: false,
            extract_dates: false,
            extract_triplets: false,
            instant_index: false,
            ..Default::default()
        };
        match vector {
            Some(vector) => {
                capsule.put_with_embedding_and_options(doc.text.as_bytes(), vector, options)?
            }
            None => capsule.put_bytes_with_options(doc.text.as_bytes(), options)?,
        };
    }
    capsule.end_batch()?;
    capsule.commit()?;
    Ok(())
}
