//! Sessions: each client gets its own replies alone, and sockets and ports are used again
//! once no late reply can come. Most tests wait for that time, together.

mod ended;
mod flood;
mod give_way;
mod in_clients_names;
mod own_replies;
mod soak;
mod spoofed_sessions;
