//! The layout through the crate's public door, without Python.

#![allow(clippy::unwrap_used)] // a test may panic; the setting for tests covers #[test] functions, not their helpers

use memvid_export_native::{CapsuleReader, CapsuleWriter, Error, FrameDoc, Options};

fn options(threads: usize) -> Options {
    Options {
        timestamp: 1_767_312_000,
        model: Some("test".into()),
        dimension: Some(4),
        slice_frames: 3,
        capacity: 52_428_800,
        threads,
    }
}

fn doc(n: usize) -> FrameDoc {
    FrameDoc {
        uri: format!("mv2://nodes/{n}"),
        title: format!("Function: f{n}"),
        track: "nodes/Function".into(),
        tags: vec!["source=gitnexus".into()],
        text: format!("Node Function\nname=f{n}\nçödé — {n}"),
        extra: format!("{{\"startLine\":{n},\"filePath\":\"a/b.py\"}}"),
    }
}

fn write(path: &std::path::Path, threads: usize, count: usize) -> Vec<u8> {
    let mut writer = CapsuleWriter::create(path, options(threads)).unwrap();
    for n in 0..count {
        writer
            .add(vec![doc(n)], &[0], &[n as f32, 1.0, 2.0, 3.0])
            .unwrap();
    }
    let summary = writer.finish().unwrap();
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(
        (summary.frames, summary.vectors),
        (count as u64, count as u64)
    );
    assert_eq!(summary.file_bytes, bytes.len() as u64);
    bytes
}

#[test]
fn frames_and_vectors_come_back_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.mv2");
    write(&path, 2, 20);
    let reader = CapsuleReader::open(&path).unwrap();
    assert_eq!(reader.document_count(), 20);
    for n in 0..20 {
        let frame = reader.document(n).unwrap();
        assert_eq!(
            frame.uri.as_deref(),
            Some(format!("mv2://nodes/{n}").as_str())
        );
        assert_eq!(frame.extra_metadata["startLine"], n.to_string());
        assert_eq!(frame.extra_metadata["filePath"], "a/b.py");
        assert_eq!(reader.text(n).unwrap(), doc(n).text);
    }
    let vectors = reader.vectors().unwrap().unwrap();
    assert_eq!(vectors.documents, (0..20).collect::<Vec<_>>());
    assert_eq!(vectors.rows[16..20], 0f32.to_le_bytes());
    assert!(matches!(reader.document(20), Err(Error::Unreadable { .. })));
}

#[test]
fn threads_do_not_change_the_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let one = write(&folder.path().join("one.mv2"), 1, 31);
    let many = write(&folder.path().join("many.mv2"), 7, 31);
    assert!(one == many);
}

#[test]
fn a_capsule_without_frames_is_a_capsule() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.mv2");
    write(&path, 2, 0);
    let reader = CapsuleReader::open(&path).unwrap();
    assert_eq!(reader.document_count(), 0);
    assert!(reader.vectors().unwrap().is_none());
}

#[test]
fn metadata_that_is_no_object_names_its_frame() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = CapsuleWriter::create(&folder.path().join("c.mv2"), options(2)).unwrap();
    let bad = FrameDoc {
        extra: "[1]".into(),
        ..doc(1)
    };
    writer.add(vec![doc(0), bad], &[], &[]).unwrap();
    let error = writer.finish().unwrap_err();
    assert!(matches!(error, Error::Frame { frame: 1, .. }), "{error}");
}

#[test]
fn the_capacity_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let small = Options {
        capacity: 70_000,
        ..options(2)
    };
    let mut writer = CapsuleWriter::create(&folder.path().join("c.mv2"), small).unwrap();
    let outcome = (0..2_000)
        .try_for_each(|n| writer.add(vec![doc(n)], &[], &[]))
        .and_then(|()| writer.finish().map(drop));
    assert!(matches!(
        outcome,
        Err(Error::Capacity { limit: 70_000, .. })
    ));
}

#[test]
fn a_writer_that_is_dropped_ends_its_threads() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = CapsuleWriter::create(&folder.path().join("c.mv2"), options(4)).unwrap();
    for n in 0..50 {
        writer.add(vec![doc(n)], &[], &[]).unwrap();
    }
    drop(writer); // joins them; a thread that waited for ever would hang the test
}
