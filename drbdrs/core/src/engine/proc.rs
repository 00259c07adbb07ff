//! Procedures: things that take several steps with waits between them, written as `async fn`.
//!
//! A procedure waits only for facts of the engine ([`Cx::until`]); after each event every waiting
//! procedure looks whether its fact has become true. No clock, no waker, no thread: the order is
//! that of the list, so the same events give the same actions. The data path does not use
//! procedures.

use alloc::boxed::Box;
use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};

use super::Core;

/// A running procedure.
pub(super) type Proc = Pin<Box<dyn Future<Output = ()>>>;

/// A procedure that is to be started.
pub(super) type Start = Box<dyn FnOnce(Cx) -> Proc>;

/// Access of procedures to the engine. Never held across a wait.
#[derive(Clone)]
pub(super) struct Cx {
    core: Rc<RefCell<Core>>,
}

impl Cx {
    /// Does something with the engine, at once.
    pub(super) fn with<R>(&self, act: impl FnOnce(&mut Core) -> R) -> R {
        act(&mut self.core.borrow_mut())
    }

    /// Waits until `look` finds something.
    pub(super) fn until<R, F>(&self, look: F) -> Until<'_, F>
    where
        F: FnMut(&mut Core) -> Option<R> + Unpin,
    {
        Until { cx: self, look }
    }
}

/// See [`Cx::until`].
pub(super) struct Until<'a, F> {
    cx: &'a Cx,
    look: F,
}

impl<F, R> Future for Until<'_, F>
where
    F: FnMut(&mut Core) -> Option<R> + Unpin,
{
    type Output = R;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<R> {
        let this = &mut *self;
        let mut core = this.cx.core.borrow_mut();
        match (this.look)(&mut core) {
            Some(found) => {
                core.touch();
                Poll::Ready(found)
            }
            None => Poll::Pending,
        }
    }
}

/// All procedures, and the engine that they work on.
pub(super) struct Procs {
    core: Rc<RefCell<Core>>,
    running: Vec<Proc>,
}

impl Procs {
    pub(super) fn new(core: Core) -> Self {
        Self { core: Rc::new(RefCell::new(core)), running: Vec::new() }
    }

    /// The engine.
    pub(super) fn with<R>(&self, act: impl FnOnce(&mut Core) -> R) -> R {
        act(&mut self.core.borrow_mut())
    }

    /// One round: starts what is to be started, and lets everybody look once.
    pub(super) fn round(&mut self) {
        let mut context = Context::from_waker(Waker::noop());
        let started = core::mem::take(&mut self.core.borrow_mut().starting);
        for start in started {
            self.running.push(start(Cx { core: Rc::clone(&self.core) }));
        }
        self.running.retain_mut(|proc| proc.as_mut().poll(&mut context).is_pending());
    }
}

impl Core {
    /// Starts a procedure after the present step.
    pub(super) fn start<F>(&mut self, make: impl FnOnce(Cx) -> F + 'static)
    where
        F: Future<Output = ()> + 'static,
    {
        self.touch();
        self.starting.push(Box::new(move |cx| Box::pin(make(cx))));
    }

    /// Something changed that a procedure may wait for.
    pub(super) fn touch(&mut self) {
        self.version += 1;
    }
}
