// Package simnode is many nodes in one process: real keys, certificates,
// channels and sessions, without what a node does to its host. It is the load
// behind `sallyport sim`, and nothing that a role needs.
//
// A [Worker] holds some thousand nodes and keeps their identities, their
// accepted revisions and their events in a few append-only files with group
// commit, where real nodes have a directory each. Its owner talks to it in
// lines of JSON: [Command] down, [Report] up.
package simnode
