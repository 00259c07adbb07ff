//! Handing out requests to the engine, in pieces that the device takes.

use drbd_core::event::{AppOp, AppRequest, Event, WriteFlags};
use drbd_core::ids::{AppId, BufId};
use drbd_core::slab::Key;
use drbd_types::{Sector, SectorCount, SectorRange};

use super::{Client, Kind, Nbd, PIECES_MAX, Piece, Reading, Request};
use crate::plane::Env;
use crate::plane::buf::Zone;

impl Nbd {
    /// Hands out pieces. True: all of them, and the next request may come.
    pub(super) fn issue(&mut self, env: &mut Env<'_>, id: u32, key: Key<Request>) -> bool {
        while let Some(request) = self.requests.get(key) {
            if request.issued == request.len || request.error.is_some() {
                break;
            }
            let is_whole = request.kind == Kind::Read { whole: true };
            let is_first = request.issued == 0;
            if is_whole && is_first && !self.reserve(env, id, key) {
                return false;
            }
            if !self.issue_piece(env, id, key) {
                return false;
            }
        }
        if let Some(client) = self.clients.get_mut(&id) {
            client.reading = Reading::Head;
        }
        // After an error there may be no piece left whose end would do this.
        if let Some(request) = self.requests.get_mut(key)
            && request.open == 0
        {
            request.len = request.issued;
            self.go_on(env, key);
        }
        true
    }

    /// All buffers of a reply in one piece, or none: whoever holds some and waits for others would
    /// wait for those who do the same.
    fn reserve(&mut self, env: &mut Env<'_>, id: u32, key: Key<Request>) -> bool {
        let Some(most) = self.piece_max(key) else { return true };
        let (Some(client), Some(request)) = (self.clients.get_mut(&id), self.requests.get_mut(key))
        else {
            return true;
        };
        let total = usize::try_from(request.len).unwrap_or(usize::MAX);
        if !client.may_have(total) {
            return false;
        }
        let mut at = 0;
        while at < request.len {
            let len = usize::try_from((request.len - at).min(most)).unwrap_or(0);
            let Some(buf) = env.pool.alloc(Zone::Front, len) else {
                request.whole.drain(..).for_each(|buf| env.pool.release(buf));
                return false;
            };
            request.whole.push(buf);
            at += len as u64;
        }
        client.held += total;
        true
    }

    /// Largest piece of a request, bytes.
    fn piece_max(&self, key: Key<Request>) -> Option<u64> {
        let request = self.requests.get(key)?;
        let client = self.clients.get(&request.client)?;
        let offer = self.offers.get(&client.volume.0)?;
        let most = match request.kind {
            Kind::Trim => offer.max_discard,
            Kind::Zeroes { .. } => offer.max_write_zeroes,
            Kind::Read { .. }
            | Kind::Write
            | Kind::Flush
            | Kind::ZeroData
            | Kind::Status { .. } => offer.max_io,
        };
        Some(u64::from(most / 512 * 512).max(4096))
    }

    fn issue_piece(&mut self, env: &mut Env<'_>, id: u32, key: Key<Request>) -> bool {
        let Some(most) = self.piece_max(key) else { return true };
        let (Some(client), Some(request)) = (self.clients.get_mut(&id), self.requests.get_mut(key))
        else {
            return true;
        };
        let offset = request.start + request.issued;
        let len = (request.len - request.issued).min(most);
        let Ok(size) = u32::try_from(len) else { return true };
        let Some(range) = range_of(offset, len) else { return true };
        let needs_buffer = matches!(request.kind, Kind::Read { .. } | Kind::ZeroData);
        let buf = if needs_buffer {
            let reserved = usize::try_from(request.issued / most).unwrap_or(0);
            match request.whole.get(reserved) {
                Some(buf) => Some(*buf),
                None => match room(env, client, size as usize) {
                    Some(buf) => Some(buf),
                    None => return false,
                },
            }
        } else if request.open >= PIECES_MAX {
            return false;
        } else {
            None
        };
        let flags = WriteFlags { fua: request.fua, preflush: false, sync: true };
        let op = match (request.kind, buf) {
            (Kind::Read { .. }, Some(buf)) => AppOp::Read { range, buf },
            (Kind::ZeroData, Some(buf)) => {
                env.pool.bytes_mut(buf).fill(0);
                AppOp::Write { range, buf, flags }
            }
            (Kind::Trim, _) => AppOp::Discard { range },
            (Kind::Zeroes { keep }, _) => AppOp::WriteZeroes { range, may_unmap: !keep },
            (
                Kind::Read { .. }
                | Kind::ZeroData
                | Kind::Write
                | Kind::Flush
                | Kind::Status { .. },
                _,
            ) => {
                return true;
            }
        };
        if buf.is_some() && request.whole.is_empty() {
            client.held += size as usize;
        }
        request.issued += len;
        request.open += 1;
        let volume = client.volume;
        let app = self.pieces.insert(Piece { request: key, offset, len: size, buf });
        env.events.push(Event::App(AppRequest { id: AppId(app.raw()), volume, op }));
        true
    }

    /// Data of a write arrives, piece by piece.
    pub(super) fn read_data(
        &mut self,
        env: &mut Env<'_>,
        id: u32,
        key: Key<Request>,
        piece: Option<(BufId, u32)>,
    ) -> bool {
        let Some(most) = self.piece_max(key) else { return false };
        let (Some(client), Some(request)) = (self.clients.get_mut(&id), self.requests.get_mut(key))
        else {
            return false;
        };
        if client.inbox.in_flight().is_some() {
            return false;
        }
        let Some((buf, size)) = piece else {
            let len = (request.len - request.issued).min(most);
            let Ok(size) = u32::try_from(len) else { return false };
            let Some(buf) = room(env, client, size as usize) else { return false };
            client.held += size as usize;
            client.inbox.expect(buf, size as usize);
            client.reading = Reading::Data { request: key, piece: Some((buf, size)) };
            return true;
        };
        if !client.inbox.fill(env) {
            return false;
        }
        let offset = request.start + request.issued;
        let Some(range) = range_of(offset, size.into()) else { return false };
        request.issued += u64::from(size);
        request.open += 1;
        client.reading = if request.issued < request.len {
            Reading::Data { request: key, piece: None }
        } else {
            Reading::Head
        };
        let flags = WriteFlags { fua: request.fua, preflush: false, sync: true };
        let volume = client.volume;
        let piece = Piece { request: key, offset, len: size, buf: Some(buf) };
        let app = self.pieces.insert(piece);
        let op = AppOp::Write { range, buf, flags };
        env.events.push(Event::App(AppRequest { id: AppId(app.raw()), volume, op }));
        true
    }
}

/// A buffer for a client, if it may have it.
fn room(env: &mut Env<'_>, client: &Client, len: usize) -> Option<BufId> {
    if !client.may_have(len) {
        return None;
    }
    env.pool.alloc(Zone::Front, len)
}

fn range_of(offset: u64, len: u64) -> Option<SectorRange> {
    SectorRange::new(Sector(offset / 512), SectorCount(len / 512))
}
