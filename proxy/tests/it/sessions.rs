//! Sessions: whose replies are whose, what ends them, and what becomes of their
//! sockets and ports then. Most tests wait for ports to have rested, together.

mod ended;
mod flood;
mod give_way;
mod in_clients_names;
mod own_replies;
mod soak;
mod spoofed_sessions;
