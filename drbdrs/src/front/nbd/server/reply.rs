//! Replies to requests.

use drbd_core::action::SendData;
use drbd_core::ids::BufId;
use zerocopy::IntoBytes;
use zerocopy::byteorder::network_endian::{U16, U32, U64};

use super::super::proto::{self, ChunkHead, DataChunk, NbdError, SimpleReply, chunk};
use super::{Client, Ending, Kind, Request};
use crate::plane::Env;

pub(super) fn reply(env: &mut Env<'_>, client: &mut Client, request: &Request, whole: &[BufId]) {
    let cookie = request.cookie;
    match (request.kind, request.error) {
        (Kind::Read { .. }, Some(error)) => push_error(env, client, cookie, error, true),
        (Kind::Read { whole: true }, None) if client.structured => {
            let length = u32::try_from(request.len + 8).unwrap_or(u32::MAX);
            let head = chunk_head(cookie, chunk::OFFSET_DATA, true, length);
            let head = DataChunk { head, offset: U64::new(request.start) };
            client.outbox.push(env, head.as_bytes(), None, None);
            push_all(env, client, whole);
        }
        (Kind::Read { whole: true }, None) => {
            push_simple(env, client, cookie, 0);
            push_all(env, client, whole);
        }
        // The last chunk was the end.
        (Kind::Read { whole: false }, None) => {}
        (_, error) => push_simple(env, client, cookie, error.map_or(0, |error| error as u32)),
    }
}

pub(super) fn push_all(env: &mut Env<'_>, client: &mut Client, whole: &[BufId]) {
    for buf in whole {
        client.outbox.push(env, &[], Some(SendData::Buf(*buf)), None);
    }
}

pub(super) fn push_simple(env: &mut Env<'_>, client: &mut Client, cookie: [u8; 8], error: u32) {
    let reply =
        SimpleReply { magic: U32::new(proto::SIMPLE_MAGIC), error: U32::new(error), cookie };
    client.outbox.push(env, reply.as_bytes(), None, None);
}

/// `is_read`: where replies are structured, this one must be.
pub(super) fn push_error(
    env: &mut Env<'_>,
    client: &mut Client,
    cookie: [u8; 8],
    error: NbdError,
    is_read: bool,
) {
    if client.structured && is_read {
        let mut body = U32::new(error as u32).as_bytes().to_vec();
        body.extend_from_slice(&[0, 0]);
        push_chunk(env, client, cookie, chunk::ERROR, true, &body);
    } else {
        push_simple(env, client, cookie, error as u32);
    }
}

pub(super) fn chunk_head(cookie: [u8; 8], kind: u16, is_last: bool, length: u32) -> ChunkHead {
    ChunkHead {
        magic: U32::new(proto::CHUNK_MAGIC),
        flags: U16::new(if is_last { chunk::DONE } else { 0 }),
        kind: U16::new(kind),
        cookie,
        length: U32::new(length),
    }
}

pub(super) fn push_chunk(
    env: &mut Env<'_>,
    client: &mut Client,
    cookie: [u8; 8],
    kind: u16,
    is_last: bool,
    body: &[u8],
) {
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let head = chunk_head(cookie, kind, is_last, length);
    client.outbox.push(env, head.as_bytes(), None, None);
    client.outbox.push(env, body, None, None);
}

pub(super) fn push_data(
    env: &mut Env<'_>,
    client: &mut Client,
    cookie: [u8; 8],
    offset: u64,
    buf: BufId,
    is_last: bool,
) {
    if client.ending == Ending::Dead {
        return;
    }
    let length = u32::try_from(env.pool.len(buf) + 8).unwrap_or(u32::MAX);
    let head = chunk_head(cookie, chunk::OFFSET_DATA, is_last, length);
    let head = DataChunk { head, offset: U64::new(offset) };
    client.outbox.push(env, head.as_bytes(), Some(SendData::Buf(buf)), None);
}
