//! From the program to its clients: by the reply path of the latest datagram.
