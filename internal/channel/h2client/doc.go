// Package h2client is the client's side of one HTTP/2 connection (RFC 9113)
// that costs next to nothing while it waits. A channel has thousands of them,
// each with one request that is answered for ever (signals) or a few CONNECT
// streams that mostly rest.
//
// A connection keeps one goroutine, its read loop, and no buffer: frame headers
// are read straight from the connection (TLS hands out what it has opened
// without a system call), payloads straight into pooled pieces that are held
// only while they are unread, and frames to be sent are built in a pooled buffer
// that leaves with one Write. Header compression keeps no state in either
// direction: we take no dynamic table and use none (RFC 7541 section 4.2).
//
// It does what a channel needs and no more: prior knowledge, no push, no
// priorities, no trailers. The other end is a server of golang.org/x/net/http2,
// or an attacker.
package h2client
