package session

import (
	"crypto/tls"
	"crypto/x509"
	"runtime"
	"sync"
	"weak"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// maxTickets is how many parties a gateway can resume a session with. A ticket
// takes about 2 KiB.
const maxTickets = 4096

// resumption is what makes the sessions of one identity resumable: the tickets
// that it was given, and the configuration whose keys seal those it gives. It
// is forgotten when the leaf, its key or the trusted roots change, and with the
// identity.
type resumption struct {
	mu      sync.Mutex
	leaf    *tls.Certificate
	tickets tls.ClientSessionCache
	roots   *x509.CertPool
	key     wire.KeyHash
	server  *tls.Config
}

var (
	memoryMu sync.Mutex
	memory   = map[weak.Pointer[identity.Identity]]*resumption{}
)

func resumptionOf(id *identity.Identity) *resumption {
	key := weak.Make(id)
	memoryMu.Lock()
	defer memoryMu.Unlock()
	r := memory[key]
	if r == nil {
		r = &resumption{}
		memory[key] = r
		runtime.AddCleanup(id, func(key weak.Pointer[identity.Identity]) {
			memoryMu.Lock()
			defer memoryMu.Unlock()
			delete(memory, key)
		}, key)
	}
	return r
}

// clientCache is for sessions that are opened with leaf: a resumed session is
// that of the leaf with which it was first opened.
func (r *resumption) clientCache(leaf *tls.Certificate) tls.ClientSessionCache {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.leaf != leaf {
		r.leaf, r.tickets = leaf, tls.NewLRUClientSessionCache(maxTickets)
	}
	return r.tickets
}

// serverConfig returns the configuration that belongs to the trusted roots and to
// our key: a session that is resumed is one with the key of its beginning, and
// that is revoked as soon as there is another.
func (r *resumption) serverConfig(id *identity.Identity, build func(*x509.CertPool) *tls.Config) *tls.Config {
	r.mu.Lock()
	defer r.mu.Unlock()
	if roots, key := id.Roots(), id.KeyHash(); r.roots == nil || r.key != key || !r.roots.Equal(roots) {
		r.roots, r.key, r.server = roots, key, build(roots)
	}
	return r.server
}
