//! The reader refuses damaged capsules: no panic, no read outside the file, no memory beyond what it says. `native/fuzz`
//! runs it under AddressSanitizer. `FUZZ_CASES` and `FUZZ_SEED` make other cases.

#![allow(clippy::unwrap_used)]

use memvid_export_native::{CapsuleReader, CapsuleWriter, FrameDoc, Options};

/// xorshift64*: the same cases for the same seed, everywhere.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize) % sides.max(1)
    }
}

const FOOTER: &[u8] = b"MV2FOOT!";
const NUMBERS: [u64; 9] = [
    0,
    1,
    0x7f,
    0xff,
    0xffff,
    1 << 31,
    1 << 40,
    i64::MAX as u64,
    u64::MAX,
];

fn sample() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.mv2");
    let options = Options {
        timestamp: 1_767_312_000,
        model: Some("test".into()),
        dimension: Some(4),
        slice_frames: 3,
        capacity: 52_428_800,
        threads: 1,
    };
    let mut writer = CapsuleWriter::create(&path, options).unwrap();
    for n in 0..6 {
        let doc = FrameDoc {
            uri: format!("mv2://nodes/{n}"),
            title: format!("Function: f{n}"),
            track: "nodes/Function".into(),
            tags: vec!["source=gitnexus".into()],
            text: format!(
                "Node Function\nname=f{n}\nçödé — {n}\n{}",
                "long ".repeat(40 * n)
            ),
            extra: format!("{{\"startLine\":{n}}}"),
        };
        writer
            .add(vec![doc], &[0], &[n as f32, 1.0, 2.0, 3.0])
            .unwrap();
    }
    writer.finish().unwrap();
    std::fs::read(&path).unwrap()
}

fn change(bytes: &mut Vec<u8>, dice: &mut Dice) {
    for _ in 0..[1, 1, 2, 4][dice.roll(4)] {
        let at = dice.roll(bytes.len());
        match dice.roll(5) {
            0 => bytes[at] ^= 1 << dice.roll(8),
            1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][dice.roll(5)],
            2 => {
                let number = NUMBERS[dice.roll(NUMBERS.len())].to_le_bytes();
                let end = bytes.len().min(at + 8);
                bytes[at..end].copy_from_slice(&number[..end - at]);
            }
            3 => bytes.truncate(at),
            _ => {
                let piece = bytes[at..bytes.len().min(at + 32)].to_vec();
                bytes.splice(at..at, piece);
            }
        }
        if bytes.is_empty() {
            return;
        }
    }
}

/// Damages the file anywhere, or its table of contents, with the footer's hash made right again.
fn damaged(sample: &[u8], dice: &mut Dice) -> Vec<u8> {
    let mut bytes = sample.to_vec();
    if dice.roll(4) == 0 {
        change(&mut bytes, dice);
        return bytes;
    }
    let footer = sample
        .windows(8)
        .rposition(|found| found == FOOTER)
        .unwrap();
    let length = u64::from_le_bytes(sample[footer + 8..footer + 16].try_into().unwrap()) as usize;
    let mut toc = sample[footer - length..footer].to_vec();
    change(&mut toc, dice);
    bytes.truncate(footer - length);
    bytes.extend(&toc);
    bytes.extend(FOOTER);
    bytes.extend((toc.len() as u64).to_le_bytes());
    bytes.extend(blake3::hash(&toc).as_bytes());
    bytes.extend(&sample[footer + 48..]);
    bytes
}

fn setting(name: &str, otherwise: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(otherwise)
}

#[test]
fn a_damaged_capsule_is_read_or_refused() {
    let sample = sample();
    let folder = tempfile::tempdir().unwrap();
    let mut dice = Dice(setting("FUZZ_SEED", 1) | 1);
    let (mut read, mut refused) = (0, 0);
    for number in 0..setting("FUZZ_CASES", 2_000) {
        let path = folder.path().join(format!("{}.mv2", number % 2));
        std::fs::write(&path, damaged(&sample, &mut dice)).unwrap();
        let Ok(reader) = CapsuleReader::open(&path) else {
            refused += 1;
            continue;
        };
        let whole = reader.verify().is_ok()
            & reader.vectors().is_ok()
            & reader.texts(0, reader.document_count()).is_ok()
            & (0..reader.document_count()).all(|place| reader.document(place).is_ok());
        let _ = reader.model();
        if whole {
            read += 1;
        } else {
            refused += 1;
        }
    }
    println!("read {read}, refused {refused}");
    assert!(read > 0 && refused > read / 2);
}
