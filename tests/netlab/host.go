package netlab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

const namespaces = "/run/netns"

// Host is a network namespace with one address.
type Host struct {
	Name    string
	Network string

	lab       *Lab
	namespace string
	addr      netip.Addr
	router    netip.Addr
}

// Addr is the host's IPv4 address.
func (h *Host) Addr() netip.Addr { return h.addr }

// AddrPort is the host's address with a port, as one dials it.
func (h *Host) AddrPort(port uint16) string { return netip.AddrPortFrom(h.addr, port).String() }

// Command prepares a program that will run on the host: in its network
// namespace and with its resolv.conf, otherwise on the same file system.
func (h *Host) Command(ctx context.Context, program string, args ...string) *exec.Cmd {
	ipPath, err := find("ip")
	if err != nil {
		ipPath = "ip" // Available was asked before; Start names it in its error
	}
	return exec.CommandContext(ctx, ipPath, append([]string{"netns", "exec", h.namespace, program}, args...)...)
}

// Do calls f on a thread inside the host's namespace. Sockets that f opens
// itself, on its own goroutine and by address, belong to the host for as long
// as they live.
func (h *Host) Do(f func() error) error { return inNamespace(h.namespace, f) }

// inNamespace goes back to where the thread came from before it lets go of the
// thread: one that ended here instead would, as the parent that Linux takes it
// for, end every process it once started with Pdeathsig (prctl(2)).
func inNamespace(namespace string, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := enter(filepath.Join(namespaces, namespace))
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("enter namespace %s: %w", namespace, err)
			return
		}
		err = f()
		if back := home(); back != nil {
			// Still locked, the thread ends with the goroutine: no other
			// code may run in the wrong namespace.
			done <- errors.Join(err, fmt.Errorf("leave namespace %s: %w", namespace, back))
			return
		}
		runtime.UnlockOSThread()
		done <- err
	}()
	return <-done
}

// enter moves the calling thread into the network namespace at path; home
// moves it back.
func enter(path string) (home func() error, err error) {
	origin, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errors.Join(err, unix.Close(origin))
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return nil, errors.Join(err, unix.Close(origin))
	}
	return func() error {
		return errors.Join(unix.Setns(origin, unix.CLONE_NEWNET), unix.Close(origin))
	}, nil
}

// Listen opens a TCP listener on the host; port 0 chooses one.
func (h *Host) Listen(port uint16) (l net.Listener, err error) {
	err = h.Do(func() error {
		l, err = net.Listen("tcp4", h.AddrPort(port))
		return err
	})
	return l, err
}

// ListenUDP opens a UDP socket on the host; port 0 chooses one.
func (h *Host) ListenUDP(port uint16) (c *net.UDPConn, err error) {
	err = h.Do(func() error {
		c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(h.addr, port)))
		return err
	})
	return c, err
}

// Dial opens a connection from the host to an IP address and port.
func (h *Host) Dial(network, addr string, timeout time.Duration) (c net.Conn, err error) {
	err = h.Do(func() error {
		c, err = net.DialTimeout(network, addr, timeout)
		return err
	})
	return c, err
}

// Knock sends one UDP datagram and one TCP SYN to addr and expects no answer:
// the positive control of a counter.
func (h *Host) Knock(addr netip.AddrPort) error {
	u, err := h.Dial("udp4", addr.String(), time.Second)
	if err != nil {
		return err
	}
	_, err = u.Write([]byte("knock"))
	if err := errors.Join(err, u.Close()); err != nil {
		return err
	}
	// The first retransmission of a SYN comes after one second.
	c, err := h.Dial("tcp4", addr.String(), 500*time.Millisecond)
	if err == nil {
		return errors.Join(fmt.Errorf("%s is reachable from %s", addr, h.Name), c.Close())
	}
	return nil
}

// Capture writes every frame that the host's network card sends or receives to
// w, without framing, until the returned function is called. That function
// returns, once everything seen until then is written, how many frames that was
// and how many the kernel had to drop.
func (h *Host) Capture(w io.Writer) (stop func() (frames, dropped int, err error), err error) {
	fd := -1
	err = h.Do(func() error {
		var err error
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(bigEndian(unix.ETH_P_ALL)))
		if err != nil {
			return fmt.Errorf("packet socket: %w", err)
		}
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		return errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: bigEndian(unix.ETH_P_ALL), Ifindex: eth0.Index}))
	})
	if err != nil {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "capture of "+h.Name)
	frames, done := 0, make(chan error, 1)
	go func() {
		buf := make([]byte, 64<<10)
		var until time.Time // of traffic that does not pause
		for {
			n, err := file.Read(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				// Stopped: from now on file.Read only says so, and what the
				// card had seen by then may still wait in the socket.
				if until.IsZero() {
					until = time.Now().Add(5 * time.Second)
				}
				if n, err = unix.Read(fd, buf); errors.Is(err, unix.EAGAIN) || time.Now().After(until) {
					done <- nil
					return
				}
			}
			if err != nil {
				done <- err
				return
			}
			frames++
			if _, err := w.Write(buf[:n]); err != nil {
				done <- err
				return
			}
		}
	}()
	return func() (int, int, error) {
		err := file.SetReadDeadline(time.Now())
		err = errors.Join(err, <-done)
		stats, statErr := unix.GetsockoptTpacketStats(fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
		err = errors.Join(err, statErr, file.Close())
		if statErr != nil {
			return frames, 0, err
		}
		return frames, int(stats.Drops), err
	}, nil
}

func bigEndian(v uint16) uint16 { return v<<8 | v>>8 }
