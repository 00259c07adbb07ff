//! The control plane: the admin socket, and what its commands do with the resources of this node.
//!
//! ```text
//!   server --> commands --> registry -- ask --> plane threads (one per resource)
//!      ^                       | pump <-- Told --/
//!      +-- watchers, replies --+--> status file, handlers, exports
//! ```
//!
//! One thread, tokio's current-thread runtime; state is in `Rc<RefCell<...>>` and never borrowed
//! across an `await`. What costs time (threads of resources, handlers) runs elsewhere.

mod commands;
pub mod convert;
mod devices;
mod exports;
mod faults;
mod handlers;
mod machine;
mod metrics;
mod past;
mod registry;
mod server;
mod snapshot;
mod takeover;
mod why;

use std::rc::Rc;
use std::time::Duration;

use drbd_conf::settings::Settings;
use drbd_types::VolumeNr;
use tokio::net::{TcpListener, UnixListener};

pub use handlers::Program;

use crate::front::nbd::door;
use crate::plane::run;
use crate::status::file::StatusFile;

/// Longest time for one resource to go down in good order.
const DOWN_MAX: Duration = Duration::from_secs(10);

/// The control plane of a node.
pub struct Control {
    node: Rc<registry::Node>,
}

impl Control {
    /// Starts the tasks; must be called within a `LocalSet`.
    #[must_use]
    pub fn start(
        settings: Settings,
        helper: Program,
        file: Option<StatusFile>,
        listener: UnixListener,
    ) -> Self {
        let (wishes, wanted) = tokio::sync::mpsc::unbounded_channel();
        let (node, told) = registry::Node::new(settings, helper, file, wishes);
        node.write_file();
        tokio::task::spawn_local(Rc::clone(&node).pump(told));
        tokio::task::spawn_local(Rc::clone(&node).follow_counters());
        tokio::task::spawn_local(exports::grant(Rc::clone(&node), wanted));
        tokio::task::spawn_local(server::serve(Rc::clone(&node), listener));
        tokio::task::spawn_local(takeover::take_over(Rc::clone(&node)));
        Self { node }
    }

    /// Answers Prometheus there.
    pub fn serve_metrics(&self, listener: TcpListener) {
        tokio::task::spawn_local(metrics::serve(Rc::clone(&self.node), listener));
    }

    /// The list of exports, for the NBD server.
    #[must_use]
    pub fn door(&self) -> door::Registry {
        self.node.door.clone()
    }

    /// Ends everything in good order: clients get the answers to what they have asked, roles are
    /// given up, peers are told, disks are closed with clean meta-data. What can not be ended so
    /// within its time is left as after a crash, which the next start copes with.
    pub async fn shut_down(&self) {
        self.node.door.shut_down();
        self.node.will.seal();
        let ids = self.node.with_all(|all| all.iter().map(|r| r.id).collect::<Vec<_>>());
        let ends = ids.into_iter().map(|id| {
            let node = Rc::clone(&self.node);
            tokio::task::spawn_local(async move {
                let detach = || run::Command::DetachClients(None::<VolumeNr>);
                let _ = node.tell(id, detach).await;
                let known = node.with(id, |r| (r.name.clone(), takeover::minors(r)));
                let (name, minors) = known.unwrap_or_default();
                let end = commands::take_down_soon(&node, id);
                match tokio::time::timeout(DOWN_MAX, end).await {
                    Ok(Ok(())) => node.will.has_ended(&minors),
                    Ok(Err(reply)) => {
                        let text = reply.message(&name);
                        tracing::warn!("drbd {name}: left as it is: {}", text.trim_end());
                        node.remove(id).await;
                    }
                    Err(_) => {
                        tracing::warn!("drbd {name}: left as it is: not down in {DOWN_MAX:?}");
                        node.remove(id).await;
                    }
                }
            })
        });
        for end in ends.collect::<Vec<_>>() {
            let _ = end.await;
        }
        self.node.remove_file();
    }
}
