// Package channel keeps persistent mutually authenticated connections between
// two parties and carries HTTP over them, always in one direction: the side
// nearer the gateway (upstream) is the HTTP client, the side nearer the node
// (downstream) is the HTTP server, whoever dialled.
//
// A [Conn] is one such connection. A [Listener] accepts them on one port, a
// [Dialer] makes one or keeps one for ever, a [Link] holds all connections to
// one downstream party. CONNECT streams are a [net.Conn] at either end: see
// [Conn.Connect], [AcceptConnect] and [Forward].
//
// Beside a channel there can be a lane: a bare TCP connection between the same
// two ports, or a TLS connection with nothing but bytes in it, which begins with
// a ticket that was agreed on over the channel. See [Conn.OpenLane] and
// [Conn.TakeLane].
//
// HTTP/2 on TCP and HTTP/3 on QUIC carry a channel with the same meaning. This
// package is the only one that knows of them, and of the ALPN names by which a
// port tells its users apart.
//
// Everything that the standard library does not check by itself is checked in
// VerifyConnection, at both ends, so that it also holds for resumed TLS
// sessions. Nothing here trusts what a peer sends before, or after, that.
package channel
