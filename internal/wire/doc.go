// Package wire holds the types that both ends of a URL speak, with their
// limits. It is a leaf: it imports nothing of ours, opens nothing and starts
// nothing.
//
// Everything parsed here may come from a hostile peer. Readers are handed to
// [DecodeJSON] with a limit; lines are read with [NewLineReader], which never
// buffers more than its limit.
package wire
