package channel

import (
	"bytes"
	"crypto/tls"
	"net"
	"testing"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// patientPair is a connection whose ends fail rather than wait for ever.
func patientPair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	if b, err = new(net.Dialer).DialContext(t.Context(), "tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if a, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{a, b} {
		if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	return a, b
}

// ticketPair shakes hands twice, the second time with what the first has left,
// and returns the ticket and whether it was taken.
func ticketPair(t *testing.T, rcp, node *identity.Identity, give, take *tickets) (ticket []byte, resumed bool) {
	t.Helper()
	cache := tls.NewLRUClientSessionCache(1)
	for _, box := range []*tickets{give, take} {
		server := &tls.Config{MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: rcp.Roots(),
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return rcp.BriefCertificate() },
			WrapSession: func(cs tls.ConnectionState, s *tls.SessionState) ([]byte, error) {
				b, err := box.wrap(cs, s)
				if ticket == nil {
					ticket = b
				}
				return b, err
			}, UnwrapSession: box.unwrap}
		client := &tls.Config{MinVersion: tls.VersionTLS13, ServerName: rcp.TrustDomain(), RootCAs: node.Roots(), ClientSessionCache: cache,
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return node.BriefCertificate() }}
		a, b := patientPair(t)
		served := make(chan error, 1)
		go func() {
			s := tls.Server(a, server)
			_, err := s.Write([]byte("x"))
			served <- err
		}()
		c := tls.Client(b, client)
		var one [1]byte
		if _, err := c.Read(one[:]); err != nil { // the ticket comes before it
			t.Fatal(err)
		}
		if err := <-served; err != nil {
			t.Fatal(err)
		}
		resumed = c.ConnectionState().DidResume
		if cs := c.ConnectionState(); len(cs.VerifiedChains) == 0 {
			t.Error("the chain was not verified")
		}
		_, _ = a.Close(), b.Close()
	}
	return ticket, resumed
}

// TestTicketsLeaveOutWhatIsShared: a ticket is small, is taken after a restart, by whoever has the
// same key and chain, and by nobody else.
func TestTicketsLeaveOutWhatIsShared(t *testing.T) {
	ca := identitytest.NewCA(t)
	rcp, node := ca.Party(t, wire.RoleRCP), ca.Party(t, wire.RoleNode)
	box := func(id *identity.Identity) *tickets {
		secret, err := ticketSecret(id)
		if err != nil {
			t.Fatal(err)
		}
		return &tickets{id: id, secret: secret}
	}
	ticket, resumed := ticketPair(t, rcp, node, box(rcp), box(rcp))
	if !resumed {
		t.Error("the session was not resumed")
	}
	leaf := node.Chain()[0]
	if len(ticket) > len(leaf)+400 {
		t.Errorf("the ticket has %d bytes, of which the leaf is %d", len(ticket), len(leaf))
	}
	if bytes.Contains(ticket, leaf[:32]) {
		t.Error("the ticket can be read")
	}
	if _, resumed = ticketPair(t, rcp, node, box(rcp), box(ca.Party(t, wire.RoleRCP))); resumed {
		t.Error("another party took the ticket")
	}
	other := box(rcp)
	other.id = identitytest.NewCA(t).Party(t, wire.RoleRCP) // whose chain is another
	if _, resumed = ticketPair(t, rcp, node, box(rcp), other); resumed {
		t.Error("a session was resumed whose intermediate is unknown")
	}
	for _, bad := range [][]byte{nil, ticket[:10], ticket[:len(ticket)-1], append(bytes.Clone(ticket), 0), append([]byte{ticket[0] ^ 1}, ticket[1:]...)} {
		if s, err := box(rcp).unwrap(bad, tls.ConnectionState{}); s != nil || err != nil {
			t.Errorf("a ticket of %d bytes that is not ours: %v, %v", len(bad), s, err)
		}
	}
}

func FuzzAbridge(f *testing.F) {
	f.Add([]byte("leaf, intermediate, root, intermediate"), []byte("intermediate"), []byte("root"))
	f.Add([]byte(""), []byte(""), []byte("x"))
	f.Fuzz(func(t *testing.T, text, one, two []byte) {
		shared := [][]byte{one, two}
		short := abridge(text, shared)
		if back, ok := complete(short, shared); !ok || !bytes.Equal(back, text) {
			t.Errorf("%q became %q and came back as %q, %v", text, short, back, ok)
		}
		_, _ = complete(text, shared) // whatever it is
	})
}
