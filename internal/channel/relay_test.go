package channel_test

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
)

// relay stands between a dialler and a port and can cut UDP, TCP or both
// without a word, as firewalls do.
type relay struct {
	addr         string
	noUDP, noTCP atomic.Bool
	udpIn        atomic.Int64 // datagrams from diallers
	mtu          atomic.Int64 // larger datagrams from diallers are dropped; 0: none is
	tcp          net.Listener
	udp          *net.UDPConn
	wg           sync.WaitGroup
	mu           sync.Mutex
	open         []io.Closer
	target       string
	clients      map[string]*net.UDPConn
}

func newRelay(t *testing.T, target string) *relay {
	t.Helper()
	r := &relay{target: target, clients: map[string]*net.UDPConn{}}
	for try := 0; ; try++ {
		tcp, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: tcp.Addr().(*net.TCPAddr).Port})
		if err == nil {
			r.tcp, r.udp, r.addr = tcp, udp, tcp.Addr().String()
			break
		}
		_ = tcp.Close()
		if try == 5 {
			t.Fatal(err)
		}
	}
	r.wg.Go(r.runTCP)
	r.wg.Go(r.runUDP)
	t.Cleanup(func() {
		_ = r.tcp.Close()
		_ = r.udp.Close()
		r.mu.Lock()
		for _, c := range r.open {
			_ = c.Close()
		}
		r.mu.Unlock()
		r.wg.Wait()
	})
	return r
}

func (r *relay) keep(c io.Closer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.open = append(r.open, c)
}

// move leads all datagrams from now on to another listener, in mid-connection.
func (r *relay) move(target string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.target = target
	clear(r.clients)
}

func (r *relay) runTCP() {
	for {
		a, err := r.tcp.Accept()
		if err != nil {
			return
		}
		r.keep(a)
		if r.noTCP.Load() {
			continue // silence
		}
		r.mu.Lock()
		target := r.target
		r.mu.Unlock()
		b, err := net.Dial("tcp", target)
		if err != nil {
			_ = a.Close()
			continue
		}
		r.keep(b)
		for _, c := range [][2]net.Conn{{a, b}, {b, a}} {
			r.wg.Go(func() {
				_, _ = io.Copy(c[0], c[1])
				_ = c[0].Close()
				_ = c[1].Close()
			})
		}
	}
}

func (r *relay) runUDP() {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := r.udp.ReadFromUDP(buf)
		if err != nil {
			return
		}
		r.udpIn.Add(1)
		if mtu := int(r.mtu.Load()); r.noUDP.Load() || mtu > 0 && n > mtu {
			continue
		}
		r.mu.Lock()
		out, target := r.clients[from.String()], r.target
		r.mu.Unlock()
		if out == nil {
			to, err := net.ResolveUDPAddr("udp", target)
			if err != nil {
				return
			}
			if out, err = net.DialUDP("udp", nil, to); err != nil {
				return
			}
			r.mu.Lock()
			r.clients[from.String()] = out
			r.mu.Unlock()
			r.keep(out)
			r.wg.Go(func() {
				buf := make([]byte, 64<<10)
				for {
					n, err := out.Read(buf)
					if err != nil {
						return
					}
					if !r.noUDP.Load() {
						_, _ = r.udp.WriteToUDP(buf[:n], from)
					}
				}
			})
		}
		_, _ = out.Write(buf[:n])
	}
}
