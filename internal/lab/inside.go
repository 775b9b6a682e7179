package lab

import "ingot/internal/link"

// Inside calls f on a thread that is in a machine's network namespace, though not
// in its others. What f starts on other threads is not.
func (l *Lab) Inside(machine string, f func() error) error {
	ns, err := link.OpenNamespace(l.pin(machine))
	if err != nil {
		return err
	}
	defer ns.Close()
	return ns.Do(f)
}
