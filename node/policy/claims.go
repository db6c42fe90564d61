package policy

import (
	"fmt"
	"sync"
)

// Claims says which instance of the process owns a path: the first that
// claimed it, until it lets go (MI-06). Instances share one.
type Claims struct {
	mu    sync.Mutex
	owner map[string]string // path → instance
}

// claim takes all paths for an instance, or none.
func (c *Claims) claim(instance string, paths []string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range paths {
		if o, ok := c.owner[p]; ok && o != instance {
			return fmt.Errorf("%s belongs to a policy of another gateway (%s)", p, o)
		}
	}
	if c.owner == nil {
		c.owner = map[string]string{}
	}
	for _, p := range paths {
		c.owner[p] = instance
	}
	return nil
}

// keep gives back all of an instance's paths that are not in kept.
func (c *Claims) keep(instance string, kept map[string]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for p, o := range c.owner {
		if o == instance && !kept[p] {
			delete(c.owner, p)
		}
	}
}
