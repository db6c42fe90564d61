// Package tunnel carries many streams, each to a target that the other end can
// reach, in one connection: the end-to-end TLS session between a gateway, which
// opens the streams, and a node, which serves them. The connection below may be
// a lane or a CONNECT stream; the protocol is the same. See DESIGN.md.
//
// [Client] and [Server] make an end, [Tunnel.Run] moves its bytes. A [Stream]
// is a [net.Conn] whose directions end one by one. [Batch] goes below TLS and
// makes few large reads and writes of TLS's many small ones. [Join] copies
// between a stream and a local connection.
package tunnel
