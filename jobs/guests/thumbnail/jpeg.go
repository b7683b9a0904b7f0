package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// Markers of JPEG (ITU-T T.81, table B.1).
const (
	startOfImage = 0xd8
	endOfImage   = 0xd9
	startOfScan  = 0xda
	restart0     = 0xd0
	restart7     = 0xd7
	app0         = 0xe0
	app1         = 0xe1
	app2         = 0xe2
	app14        = 0xee
	app15        = 0xef
	comment      = 0xfe
)

// jpegPicture is a JPEG whose kept segments still stand as they were.
type jpegPicture struct {
	jfif     []byte   // the segment, without its preview; nil if there was none
	kept     [][]byte // all other segments that are needed, with their scans
	profiles [][]byte // of kept, those of the colour profile
	turned   int
}

func parseJPEG(data []byte) (picture, error) {
	p := jpegPicture{turned: 1}
	frame, scan := false, false
	cut := errors.New("the JPEG is cut off")
	for rest := data[2:]; ; {
		for len(rest) > 1 && rest[0] == 0xff && rest[1] == 0xff { // fill bytes
			rest = rest[1:]
		}
		switch {
		case len(rest) < 2:
			return nil, cut
		case rest[0] != 0xff:
			return nil, fmt.Errorf("the JPEG is damaged: at byte %d no marker begins", len(data)-len(rest))
		case rest[1] == endOfImage:
			if !frame || !scan {
				return nil, errors.New("the JPEG has no picture")
			}
			return p, nil
		case len(rest) < 4:
			return nil, cut
		}
		marker := rest[1]
		n := 2 + int(binary.BigEndian.Uint16(rest[2:]))
		if len(rest) < n {
			return nil, cut
		} else if n < 4 {
			return nil, fmt.Errorf("the JPEG is damaged: at byte %d a segment is shorter than its length", len(data)-len(rest))
		}
		segment := rest[:n]
		switch {
		case marker == startOfScan:
			scan = true
			segment = rest[:n+scanLength(rest[n:])]
			p.kept = append(p.kept, segment)
		case marker >= app0 && marker <= app15:
			p.application(marker, segment)
		case marker == comment:
		case marker >= 0xc0 && marker < restart0 || marker >= 0xdb && marker <= 0xdf: // frames, tables
			frame = frame || marker < 0xd0 && marker != 0xc4 && marker != 0xc8 && marker != 0xcc
			p.kept = append(p.kept, segment)
		default:
			return nil, fmt.Errorf("the JPEG is damaged: nobody knows what its marker %02x at byte %d means", marker, len(data)-len(rest))
		}
		rest = rest[len(segment):]
	}
}

// scanLength is how many bytes of coded pixels come before the next marker.
func scanLength(b []byte) int {
	for i := 0; i+1 < len(b); i++ {
		if b[i] == 0xff && b[i+1] != 0 && !(b[i+1] >= restart0 && b[i+1] <= restart7) {
			return i
		}
	}
	return len(b)
}

// application looks at what programs have put beside the picture. Of that a decoder needs
// the resolution, the colour profile, and Adobe's word on how the colours are coded.
func (p *jpegPicture) application(marker byte, segment []byte) {
	body := segment[4:]
	begins := func(with string) bool { return bytes.HasPrefix(body, []byte(with)) }
	switch {
	case marker == app0 && begins("JFIF\x00") && len(body) >= 14 && p.jfif == nil:
		p.jfif = slices.Concat([]byte{0xff, app0, 0, 16}, body[:12], []byte{0, 0}) // no preview
	case marker == app1 && begins("Exif\x00\x00"):
		if p.turned == 1 {
			p.turned = orientationOf(body[6:])
		}
	case marker == app2 && begins("ICC_PROFILE\x00"):
		p.kept = append(p.kept, segment)
		p.profiles = append(p.profiles, segment)
	case marker == app14 && begins("Adobe") && len(body) >= 12:
		p.kept = append(p.kept, slices.Concat([]byte{0xff, app14, 0, 14}, body[:12]))
	}
}

func (p jpegPicture) orientation() int { return p.turned }

func (p jpegPicture) stripped() []byte {
	out := slices.Concat([]byte{0xff, startOfImage}, p.jfif)
	if p.turned != 1 {
		exif := append([]byte("Exif\x00\x00"), exifOf(p.turned)...)
		out = append(out, 0xff, app1)
		out = binary.BigEndian.AppendUint16(out, uint16(2+len(exif)))
		out = append(out, exif...)
	}
	for _, s := range p.kept {
		out = append(out, s...)
	}
	return append(out, 0xff, endOfImage)
}

func (p jpegPicture) dressed(made []byte, gray bool) []byte {
	const head = 4 + len("ICC_PROFILE\x00") + 2 // marker, length, name, number and count
	if len(p.profiles) == 0 || len(p.profiles[0]) < head || !fits(space(p.profiles[0][head:]), gray) {
		return made
	}
	return slices.Concat(made[:2], slices.Concat(p.profiles...), made[2:])
}
