//! Sockets that sessions to different servers share: which session has which
//! place on which socket. A descriptor and a local port then serve as many
//! sessions as there are servers, and a reply still finds its session by the
//! server that it comes from, since of one server there is one session at the
//! most.
//!
//! No I/O stands here; what is kept with a socket is the type parameter.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use slab::Slab;

use crate::address::ServerAddr;
use crate::session::SessionId;
use crate::upstream::{Server, sharing_groups};

/// Sockets to choose from: enough that one which is being flooded is in nobody's
/// way.
pub(super) const CHOICES: usize = 4;

/// Names a shared socket for as long as it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Number(pub(super) usize);

/// The right to be the one session to one server on one shared socket, which it
/// keeps while it rests. Given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    socket: Number,
    member: usize,
    spoiled: bool,
    returned: Arc<Returned>,
}

/// A place that was given back and is not free yet.
#[derive(Debug)]
struct GivenBack {
    socket: Number,
    member: usize,
    spoiled: bool,
}

/// Of one worker alone, which looks when sessions begin and end: nobody waits
/// for the lock, and nobody takes it where nothing was given back.
#[derive(Debug, Default)]
struct Returned {
    any: AtomicBool,
    places: Mutex<Vec<GivenBack>>,
}

impl Place {
    /// An answer of the server may come yet: whoever else got this place could
    /// get that, too. Nobody may have it again when it is given back.
    pub(super) fn spoil(&mut self) {
        self.spoiled = true;
    }

    /// It has passed to another session, with all that that entails.
    pub(super) fn renew(&mut self) {
        self.spoiled = false;
    }

    /// The socket that it is on.
    pub(super) fn socket(&self) -> Number {
        self.socket
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let places = self.returned.places.lock();
        places
            .unwrap_or_else(PoisonError::into_inner)
            .push(GivenBack {
                socket: self.socket,
                member: self.member,
                spoiled: self.spoiled,
            });
        self.returned.any.store(true, Ordering::Relaxed);
    }
}

/// Servers of one listener whose sessions share sockets.
#[derive(Debug)]
struct Group {
    listener: usize,
    servers: Vec<ServerAddr>,
    /// By member: the sockets on which no session to it has a place. The lowest
    /// numbers are given first, so that the last sockets empty and close.
    vacant: Vec<BTreeSet<Number>>,
    /// How many sockets there are.
    sockets: usize,
}

#[derive(Debug)]
struct Shared<S> {
    kept: S,
    group: usize,
    /// By member: the session to it. Of a place that is taken and has no session
    /// yet there is none.
    sessions: Vec<Option<SessionId>>,
    taken: usize,
    /// Places that nobody may have again.
    spoiled: usize,
}

/// The shared sockets of one worker.
#[derive(Debug)]
pub(super) struct SharedSockets<S> {
    groups: Slab<Group>,
    /// Group and member, by numbers of listener and server.
    members: HashMap<(usize, usize), (usize, usize)>,
    /// By number of the listener: number and address of the servers that may
    /// share.
    sharing: Vec<Vec<(usize, ServerAddr)>>,
    sockets: Slab<Shared<S>>,
    returned: Arc<Returned>,
    spoiled: usize,
}

impl<S> Default for SharedSockets<S> {
    fn default() -> Self {
        Self {
            groups: Slab::new(),
            members: HashMap::new(),
            sharing: Vec::new(),
            sockets: Slab::new(),
            returned: Arc::default(),
            spoiled: 0,
        }
    }
}

impl<S> SharedSockets<S> {
    /// Serves these servers of each listener from now on. A server that would
    /// share with nobody is left to sockets of its sessions' own. Where servers
    /// come or go, or `outdated` says of numbers of listener and server that
    /// sockets to it would be made otherwise now, new sessions share new sockets;
    /// the old ones are there until their sessions have ended.
    pub(super) fn follow<'s>(
        &mut self,
        listeners: impl Iterator<Item = &'s [Server]>,
        outdated: impl Fn(usize, usize) -> bool,
    ) {
        for (listener, servers) in listeners.enumerate() {
            let shares = |s: &&Server| s.share_sockets && s.mode.can_share_sockets();
            let sharing = servers.iter().filter(shares);
            let sharing: Vec<_> = sharing.map(|s| (s.number, s.address)).collect();
            if self.sharing.len() <= listener {
                self.sharing.resize_with(listener + 1, Vec::new);
            }
            let is_outdated = |(number, _): &(usize, _)| outdated(listener, *number);
            if self.sharing[listener] == sharing && !sharing.iter().any(is_outdated) {
                continue;
            }
            self.members.retain(|(of, _), _| *of != listener);
            let addresses: Vec<_> = sharing.iter().map(|(_, address)| *address).collect();
            let groups = sharing_groups(&addresses);
            for indices in groups.iter().filter(|indices| indices.len() > 1) {
                let group = self.groups.insert(Group {
                    listener,
                    servers: indices.iter().map(|index| addresses[*index]).collect(),
                    vacant: vec![BTreeSet::new(); indices.len()],
                    sockets: 0,
                });
                for (member, index) in indices.iter().enumerate() {
                    self.members
                        .insert((listener, sharing[*index].0), (group, member));
                }
            }
            self.sharing[listener] = sharing;
        }
        let current: HashSet<_> = self.members.values().map(|(group, _)| *group).collect();
        self.groups
            .retain(|number, group| group.sockets > 0 || current.contains(&number));
    }

    /// Whether sessions of this listener to this server share sockets.
    pub(super) fn serve(&self, listener: usize, server: usize) -> bool {
        self.members.contains_key(&(listener, server))
    }

    /// Some sockets with room for a session to this server.
    pub(super) fn vacant(&self, listener: usize, server: usize) -> [Option<Number>; CHOICES] {
        let group = self.members.get(&(listener, server));
        let mut vacant = group
            .into_iter()
            .flat_map(|(group, member)| &self.groups[*group].vacant[*member]);
        [(); CHOICES].map(|()| vacant.next().copied())
    }

    /// Places that nobody may have again, as long as their sockets are there.
    pub(super) fn spoiled(&self) -> usize {
        self.spoiled
    }

    /// Takes the place of this server's session on `socket`, if it is free.
    pub(super) fn take(&mut self, socket: Number, listener: usize, server: usize) -> Option<Place> {
        let (group, member) = *self.members.get(&(listener, server))?;
        let is_free = self.groups[group].vacant[member].remove(&socket);
        let shared = self.sockets.get_mut(socket.0).filter(|_| is_free)?;
        shared.taken += 1;
        Some(Place {
            socket,
            member,
            spoiled: false,
            returned: Arc::clone(&self.returned),
        })
    }

    /// Adds a socket with room for every server that shares with this one.
    /// `None` if that shares with nobody.
    pub(super) fn add(&mut self, listener: usize, server: usize, kept: S) -> Option<Number> {
        let (group, _) = *self.members.get(&(listener, server))?;
        let members = self.groups[group].servers.len();
        let socket = Number(self.sockets.insert(Shared {
            kept,
            group,
            sessions: vec![None; members],
            taken: 0,
            spoiled: 0,
        }));
        let group = &mut self.groups[group];
        group.sockets += 1;
        for vacant in &mut group.vacant {
            vacant.insert(socket);
        }
        Some(socket)
    }

    /// Notes which session has `place`, which may have been another's before.
    pub(super) fn settle(&mut self, place: &Place, id: SessionId) {
        if let Some(shared) = self.sockets.get_mut(place.socket.0) {
            shared.sessions[place.member] = Some(id);
        }
    }

    /// What is kept with `socket`, and the number of the listener that it is for.
    pub(super) fn get_mut(&mut self, socket: Number) -> Option<(&mut S, usize)> {
        let shared = self.sockets.get_mut(socket.0)?;
        Some((&mut shared.kept, self.groups[shared.group].listener))
    }

    /// What is kept with the socket of a place, which exists as long as that.
    pub(super) fn of(&self, place: &Place) -> &S {
        &self.sockets[place.socket.0].kept
    }

    /// The session that may have been answered by what came to `socket` from
    /// `server`.
    pub(super) fn session(&self, socket: Number, server: ServerAddr) -> Option<SessionId> {
        let shared = self.sockets.get(socket.0)?;
        let servers = &self.groups[shared.group].servers;
        let member = servers.iter().position(|known| *known == server)?;
        shared.sessions[member]
    }

    /// Frees the places that were given back unspoiled, and lets go of sockets on
    /// which none is taken.
    pub(super) fn collect(&mut self) {
        if !self.returned.any.swap(false, Ordering::Relaxed) {
            return;
        }
        let places = self.returned.places.lock();
        let mut places = places.unwrap_or_else(PoisonError::into_inner);
        for given in places.drain(..) {
            let GivenBack { socket, member, .. } = given;
            let Some(shared) = self.sockets.get_mut(socket.0) else {
                continue;
            };
            shared.sessions[member] = None;
            shared.taken -= 1;
            let group = &mut self.groups[shared.group];
            if given.spoiled {
                shared.spoiled += 1;
                self.spoiled += 1;
            } else {
                group.vacant[member].insert(socket);
            }
            if shared.taken == 0 {
                for vacant in &mut group.vacant {
                    vacant.remove(&socket);
                }
                group.sockets -= 1;
                self.spoiled -= shared.spoiled;
                self.sockets.remove(socket.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::mode::Mode;
    use crate::upstream::ServerName;

    fn server(number: usize) -> Server {
        let port = u16::try_from(number).unwrap();
        Server {
            number,
            name: Arc::new(ServerName {
                upstream: "u".to_owned(),
                server: number.to_string(),
            }),
            address: ServerAddr(SocketAddr::from(([192, 0, 2, 1], port))),
            mode: Mode::Plain,
            sources: Arc::from([]),
            share_sockets: true,
        }
    }

    fn id(number: u64) -> SessionId {
        SessionId::from_bits(1 << 32 | number)
    }

    #[test]
    fn a_server_alone_shares_with_nobody() {
        let alone = [server(0)];
        let apart = [
            server(0),
            Server {
                share_sockets: false,
                ..server(1)
            },
        ];
        for servers in [&alone[..], &apart[..]] {
            let mut sockets = SharedSockets::default();
            sockets.follow([servers].into_iter(), |_, _| false);
            assert!(!sockets.serve(0, 0));
            assert_eq!(sockets.vacant(0, 0), [None; CHOICES]);
            assert_eq!(sockets.add(0, 0, ()), None);
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Begin {
            listener: usize,
            server: usize,
        },
        TakeOver {
            which: usize,
        },
        End {
            which: usize,
            spoil: bool,
        },
        /// Another setup, in which a server is there or not, or sockets are made
        /// otherwise.
        Follow {
            without: Option<usize>,
            outdated: bool,
        },
        Collect,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0..2usize, 0..5usize)
                .prop_map(|(listener, server)| Step::Begin { listener, server }),
            1 => (0..100usize).prop_map(|which| Step::TakeOver { which }),
            2 => (0..100usize, any::<bool>()).prop_map(|(which, spoil)| Step::End { which, spoil }),
            1 => (prop::option::of(0..5usize), any::<bool>())
                .prop_map(|(without, outdated)| Step::Follow { without, outdated }),
            2 => Just(Step::Collect),
        ];
        prop::collection::vec(step, 0..200)
    }

    struct Held {
        listener: usize,
        server: usize,
        place: Place,
        id: SessionId,
    }

    proptest! {
        /// Whatever begins and ends: what comes from a server to a socket is the
        /// one session's that holds that place, and nobody's when none does; a
        /// socket is there as long as one of its places is taken.
        #[test]
        fn a_place_is_one_sessions(steps in steps()) {
            let groups = |without: Option<usize>| {
                let of = |first| (first..5).filter(|n| Some(*n) != without).map(server);
                [of(0).collect::<Vec<_>>(), of(2).collect()]
            };
            let mut missing = None;
            let mut sockets = SharedSockets::default();
            sockets.follow(groups(None).iter().map(Vec::as_slice), |_, _| false);
            let mut held: Vec<Held> = Vec::new();
            let mut spoiled: Vec<(Number, usize)> = Vec::new();
            let mut begun = 0;
            for step in steps {
                match step {
                    Step::Begin { listener, server } => {
                        let serves = (listener == 0 || server >= 2) && missing != Some(server);
                        prop_assert_eq!(sockets.serve(listener, server), serves);
                        if !sockets.serve(listener, server) {
                            continue;
                        }
                        sockets.collect();
                        let socket = match sockets.vacant(listener, server)[0] {
                            Some(socket) => socket,
                            None => sockets.add(listener, server, begun).unwrap(),
                        };
                        let place = sockets.take(socket, listener, server).unwrap();
                        prop_assert!(!spoiled.contains(&(socket, server)), "an answer is owed there");
                        prop_assert!(sockets.take(socket, listener, server).is_none());
                        begun += 1;
                        sockets.settle(&place, id(begun));
                        held.push(Held { listener, server, place, id: id(begun) });
                    }
                    Step::TakeOver { which } if !held.is_empty() => {
                        begun += 1;
                        let which = which % held.len();
                        sockets.settle(&held[which].place, id(begun));
                        held[which].id = id(begun);
                    }
                    Step::End { which, spoil } if !held.is_empty() => {
                        let mut one = held.swap_remove(which % held.len());
                        if spoil {
                            one.place.spoil();
                            spoiled.push((one.place.socket(), one.server));
                        }
                        drop(one);
                        sockets.collect();
                        spoiled.retain(|(socket, _)| sockets.sockets.contains(socket.0));
                    }
                    Step::TakeOver { .. } | Step::End { .. } => {}
                    Step::Follow { without, outdated } => {
                        missing = without;
                        let groups = groups(without);
                        sockets.follow(groups.iter().map(Vec::as_slice), |_, _| outdated);
                        let of_sockets = sockets.sockets.iter().map(|(_, s)| s.group);
                        let needed: BTreeSet<_> = of_sockets.collect();
                        prop_assert!(sockets.groups.len() <= needed.len() + 2, "groups pile up");
                    }
                    Step::Collect => sockets.collect(),
                }
                for socket in (0..sockets.sockets.capacity()).map(Number) {
                    for number in 0..5 {
                        let found = sockets.session(socket, server(number).address);
                        let holder = held.iter().find(|h| h.place.socket() == socket && h.server == number);
                        prop_assert_eq!(found, holder.map(|h| h.id));
                    }
                }
                for one in &held {
                    let (_, listener) = sockets.get_mut(one.place.socket()).unwrap();
                    prop_assert_eq!(listener, one.listener);
                }
                prop_assert!(sockets.spoiled() <= spoiled.len());
                // A socket on which no place is taken is closed.
                for listener in 0..2 {
                    let of = |n: usize| held.iter().filter(|h| h.listener == listener && h.server == n).count();
                    if (0..5).all(|n| of(n) == 0) {
                        prop_assert!(sockets.sockets.iter().all(|(_, s)| sockets.groups[s.group].listener != listener));
                    }
                }
            }
        }
    }
}
